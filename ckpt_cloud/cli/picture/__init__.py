"""`ckpt-cloud show --html`: one page that needs nothing else, no script, no network."""
