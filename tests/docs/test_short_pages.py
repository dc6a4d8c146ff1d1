"""The code of pages that show single calls: interop.md, security.md and local-stores.md, each after what it assumes."""

import secrets
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from doc_pages import ROOT, blocks_of, python_of

import ckpt_cloud

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def execute(page, scope, change=lambda code: code):
    for block in blocks_of(ROOT / "docs" / page):
        if block.language == "python" and not block.reason:
            exec(compile(change(block.code), page, "exec"), scope)
    return scope


def test_interop(moto_server, monkeypatch, tmp_path):
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"page-{secrets.token_hex(4)}"
    moto_server.create_bucket(bucket)
    root = f"s3://{bucket}"
    model = {"model.weight": torch.arange(400.0).view(20, 20)}
    state = model | {"step": 100}
    # What the page assumes: a checkpoint of DCP's own, a model repository, a file of torch.save, and one of ours.
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "old"))
    ckpt_cloud.convert(tmp_path / "old", f"{root}/old/step-100", to="dcp")
    ckpt_cloud.save(model, storage_writer=ckpt_cloud.HuggingFaceWriter(f"{root}/models/llama"))
    ckpt_cloud.convert(f"{root}/old/step-100", f"{root}/model.pt", to="torch")
    ckpt_cloud.save(state, checkpoint_id=f"{root}/run/step-100")

    def change(code):
        for url in ("s3://bucket", "gs://bucket", "az://container"):
            code = code.replace(url, root)
        return code

    into = {"model.weight": torch.zeros(20, 20)}
    names = vars(ckpt_cloud) | {name: getattr(ckpt_cloud, name) for name in ckpt_cloud.__all__}
    scope = {"ckpt_cloud": ckpt_cloud, "dcp": dcp, "torch": torch, "state": into, "model_state": model}
    execute("interop.md", {**names, **scope}, change)
    assert torch.equal(into["model.weight"], model["model.weight"])


def test_security(tmp_path, monkeypatch):
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization

    private = ed25519.Ed25519PrivateKey.generate()
    pem, raw = serialization.Encoding.PEM, serialization.NoEncryption()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "signing.pem").write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, raw))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "trusted.pem").write_bytes(public)
    names = {name: getattr(ckpt_cloud, name) for name in ("ObjectStoreWriter", "ObjectStoreReader")}
    execute("security.md", {**names, "url": f"{tmp_path}/step-1"})


def test_local_stores(monkeypatch):
    # It changes the environment, as its reader wants it to; nobodys_cloud has noted what was there.
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "before")
    for name in ("AWS_DEFAULT_REGION", "AWS_ALLOW_HTTP"):
        monkeypatch.setenv(name, "before")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scope = execute("local-stores.md", {})
    assert scope["port"] > 0
    assert "localstack" in python_of("local-stores.md")
