"""What `ckpt_cloud` promises is exactly `__all__`: sorted, importable, documented, and shown under its public name."""

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import ckpt_cloud

PUBLIC = [name for name in ckpt_cloud.__all__ if not name.startswith("__")]


def test_all_is_sorted():
    assert list(ckpt_cloud.__all__) == sorted(set(ckpt_cloud.__all__))


def test_all_is_what_dir_shows():
    shown = {
        name
        for name in dir(ckpt_cloud)
        if not name.startswith("_") and not isinstance(getattr(ckpt_cloud, name), ModuleType)
    }
    assert shown == set(PUBLIC)


def test_type_checkers_see_the_same_names():
    """The lazy map is invisible to them; what `if TYPE_CHECKING:` imports must be the same names."""
    tree = ast.parse(Path(ckpt_cloud.__file__).read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [*tree.body, *(node for block in guarded for node in block.body)]
    seen = {
        alias.asname or alias.name
        for node in imports
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ckpt_cloud.")
        for alias in node.names
    }
    assert seen - {"__version__"} == set(PUBLIC)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ckpt_cloud.no_such_name


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name(name):
    value = getattr(ckpt_cloud, name)
    if not callable(value):
        return
    assert value.__module__ == "ckpt_cloud"
    # Not inspect.getdoc, which would take a parent's; nor the signature that dataclass writes for want of a docstring.
    own = value.__doc__
    assert own
    assert own.strip()
    assert not own.startswith(f"{name}(")
    if inspect.isclass(value):
        undocumented = [
            member
            for member, method in vars(value).items()
            if not member.startswith("_") and inspect.isfunction(method) and not inspect.getdoc(getattr(value, member))
        ]
        assert not undocumented
