"""What goes in comes out, bit for bit, on every kind of store."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import ckpt_cloud
from ckpt_cloud.errors import UnsupportedTensor

DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
QUANTIZED = [d for d in DTYPES if str(d).startswith(("torch.qint", "torch.quint"))]


def plannable(dtype):
    """Whether DCP's planner can tell the size of an element, which it asks `torch.finfo` and `torch.iinfo`."""
    try:
        return bool(torch._utils._element_size(dtype))
    except TypeError:
        return False


UNPLANNABLE = [d for d in DTYPES if d not in QUANTIZED and not plannable(d)]
PLAIN = [d for d in DTYPES if d not in QUANTIZED and d not in UNPLANNABLE]


def random_bits(dtype, shape):
    """A tensor of any type with any bits, NaNs and negative zeros included."""
    count = torch.Size(shape).numel()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    return torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), 0, shape, torch.empty(shape, device="meta").stride())


def bits(tensor):
    """The elements' bytes in row-major order, whatever the strides."""
    source = tensor.detach().resolve_conj().resolve_neg()
    if source.dtype.is_complex and source.dtype.itemsize == 16:
        source = torch.view_as_real(source)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[source.element_size()]
    return source.view(whole).contiguous().view(-1).view(torch.uint8).numpy().tobytes() if source.numel() else b""


def emptied(state):
    """The same structure with other values in it."""
    if isinstance(state, dict):
        return {key: emptied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(emptied(value) for value in state)
    if isinstance(state, torch.Tensor):
        return random_bits(state.dtype, tuple(state.shape))
    return None


def saved_and_loaded(state, url):
    ckpt_cloud.save(state, checkpoint_id=url)
    loaded = emptied(state)
    ckpt_cloud.load(loaded, checkpoint_id=url)
    return loaded


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
def test_every_dtype(url):
    state = {str(dtype): random_bits(dtype, (7, 5)) for dtype in PLAIN}
    state |= {f"{dtype} scalar": random_bits(dtype, ()) for dtype in PLAIN}
    state |= {f"{dtype} empty": torch.empty((0, 3), dtype=dtype) for dtype in PLAIN}
    loaded = saved_and_loaded(state, url)
    assert [name for name in state if bits(loaded[name]) != bits(state[name])] == []


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("dtype", PLAIN, ids=str)
def test_every_dtype_not_contiguous(file_url, dtype):
    """Through the staging copy on the way out, and into strided memory on the way in."""
    whole = random_bits(dtype, (6, 4))
    ckpt_cloud.save({"t": whole.t(), "skip": whole[::2]}, checkpoint_id=file_url)
    loaded = {"t": random_bits(dtype, (6, 4)).t(), "skip": random_bits(dtype, (6, 4))[::2]}
    ckpt_cloud.load(loaded, checkpoint_id=file_url)
    assert bits(loaded["t"]) == bits(whole.t())
    assert bits(loaded["skip"]) == bits(whole[::2])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
def test_quantized_is_refused_before_anything_is_written(file_url, keys, dtype):
    with pytest.raises(UnsupportedTensor, match="no plain bytes") as refused:
        ckpt_cloud.save({"good": torch.ones(3), "q": torch.empty(4, dtype=dtype)}, checkpoint_id=file_url)
    assert "'q'" in str(refused.value)
    assert refused.value.hint
    assert keys(file_url) == []


@pytest.mark.parametrize("dtype", UNPLANNABLE, ids=str)
def test_what_dcp_cannot_plan_is_refused_by_name(file_url, keys, dtype):
    with pytest.raises(UnsupportedTensor, match="DCP cannot plan") as refused:
        ckpt_cloud.save({"good": torch.ones(3), "odd": torch.empty(4, dtype=dtype)}, checkpoint_id=file_url)
    assert "'odd'" in str(refused.value)
    assert keys(file_url) == []


def test_and_goes_through_as_bytes(file_url):
    odd = random_bits(torch.uint4, (6, 2))
    ckpt_cloud.save({"odd": odd.view(torch.uint8)}, checkpoint_id=file_url)
    loaded = torch.empty(6, 2, dtype=torch.uint4)
    ckpt_cloud.load({"odd": loaded.view(torch.uint8)}, checkpoint_id=file_url)
    assert bits(loaded) == bits(odd)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_sparse_is_refused_before_anything_is_written(url, keys, layout):
    sparse = getattr(torch.eye(3), layout)()
    with pytest.raises(UnsupportedTensor, match="only dense tensors") as refused:
        ckpt_cloud.save({"good": torch.ones(3), "sparse": sparse}, checkpoint_id=url)
    assert "'sparse'" in str(refused.value)
    assert "to_dense" in refused.value.hint
    assert keys(url) == []


def test_meta_is_refused_and_leaves_nothing(url, keys):
    with pytest.raises(UnsupportedTensor, match="meta device"):
        ckpt_cloud.save({"m": torch.empty(3, device="meta")}, checkpoint_id=url)
    assert "COMMIT" not in keys(url)


VIEWS = {
    "transposed": lambda t: t.t(),
    "column": lambda t: t[:, 3],
    "every other": lambda t: t[::2, 1::3],
    "expanded": lambda t: t[:1].expand(50, -1),
    "permuted": lambda t: t.view(10, 10, 20).permute(2, 0, 1),
    "channels last": lambda t: t.view(2, 5, 10, 20).to(memory_format=torch.channels_last),
    "flipped": lambda t: t.flip(0),
    "scalar of a matrix": lambda t: t[3, 4],
    "conjugate": lambda t: torch.complex(t, -t).conj(),
    "negative": lambda t: torch.complex(t, -t).conj().imag,
    "parameter": torch.nn.Parameter,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views(url, view):
    state = {"view": view(torch.randn(100, 20))}
    assert bits(saved_and_loaded(state, url)["view"]) == bits(state["view"])


def test_a_view_does_not_drag_its_storage_along(file_url, tmp_path):
    whole = torch.randn(1000, 1000)
    loaded = saved_and_loaded({"row": whole[5], "column": whole[:, 5]}, file_url)
    assert torch.equal(loaded["row"], whole[5])
    assert torch.equal(loaded["column"], whole[:, 5])
    (pack,) = tmp_path.rglob("*.safetensors")
    assert pack.stat().st_size < 2 * 4000 + 1000


def test_tensors_that_share_storage(url):
    whole = torch.arange(100.0)
    state = {"whole": whole, "part": whole[10:20], "again": whole}
    loaded = saved_and_loaded(state, url)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_non_contiguous_over_part_boundaries(file_url):
    """Elements of 16 bytes, cut into parts and staged in pieces."""
    state = {
        "wide": torch.randn(700, 600, dtype=torch.complex128).t(),
        "odd": torch.randint(0, 256, (1023, 1001), dtype=torch.uint8).t(),
        "plain": torch.randn(999, 1001),
    }
    options = ckpt_cloud.TransferOptions(part_size=5 << 20, memory_budget=40 << 20)
    ckpt_cloud.save(state, storage_writer=ckpt_cloud.ObjectStoreWriter(file_url, transfer=options))
    loaded = emptied(state)
    ckpt_cloud.load(loaded, storage_reader=ckpt_cloud.ObjectStoreReader(file_url, transfer=options))
    assert all(bits(loaded[name]) == bits(state[name]) for name in state)


def test_many_packs_in_a_small_budget(url):
    """More packs than are under way at once, each staged, with room for two parts: slow, but it ends."""
    state = {f"t{i}": torch.randn(1100, 1200).t() for i in range(8)}
    sizes = {"part_size": 5 << 20, "pack_size": 5 << 20, "memory_budget": 10 << 20, "range_size": 5 << 20}
    options = ckpt_cloud.TransferOptions(**sizes)
    writer = ckpt_cloud.ObjectStoreWriter(url, transfer=options)
    ckpt_cloud.save(state, storage_writer=writer)
    assert writer.report.objects == 8
    loaded = emptied(state)
    ckpt_cloud.load(loaded, storage_reader=ckpt_cloud.ObjectStoreReader(url, transfer=options))
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_plain_values_nested(url):
    state = {
        "step": 3,
        "loss": 0.25,
        "none": None,
        "flag": True,
        "text": "ünï\n",
        "bytes": b"\0\xff",
        "big": b"x" * 300_000,
        "list": [1, [2.5, "x", {"deep": torch.ones(3)}], ()],
        "nested": {"a": {"b": {"c": 1}}, "d": [torch.zeros(2), {"e": "f"}]},
        "tuple": (1, "two"),
    }
    want = copy.deepcopy(state)
    loaded = saved_and_loaded(state, url)
    for name in ("step", "loss", "none", "flag", "text", "bytes", "big", "tuple"):
        assert loaded[name] == want[name], name
        assert type(loaded[name]) is type(want[name])
    assert loaded["list"][0] == 1
    assert loaded["list"][1][:2] == [2.5, "x"]
    assert torch.equal(loaded["list"][1][2]["deep"], torch.ones(3))
    assert loaded["nested"]["a"]["b"]["c"] == 1
    assert torch.equal(loaded["nested"]["d"][0], torch.zeros(2))
    assert loaded["nested"]["d"][1] == {"e": "f"}


class Counter:
    """Keeps its state by DCP's `Stateful` protocol."""

    def __init__(self, count, table):
        self.count, self.table = count, table

    def state_dict(self):
        return {"count": self.count, "table": self.table}

    def load_state_dict(self, state):
        self.count, self.table = state["count"], state["table"]


def test_stateful(url):
    ckpt_cloud.save({"counter": Counter(7, torch.arange(5))}, checkpoint_id=url)
    counter = Counter(0, torch.zeros(5, dtype=torch.int64))
    ckpt_cloud.load({"counter": counter}, checkpoint_id=url)
    assert counter.count == 7
    assert torch.equal(counter.table, torch.arange(5))


def test_what_was_saved_stays_as_training_goes_on(url):
    weight = torch.ones(1 << 21)
    ckpt_cloud.save({"weight": weight}, checkpoint_id=url)
    weight.zero_()
    loaded = {"weight": torch.empty(1 << 21)}
    ckpt_cloud.load(loaded, checkpoint_id=url)
    assert loaded["weight"].eq(1).all()


def test_an_empty_state_dict(url, keys):
    ckpt_cloud.save({}, checkpoint_id=url)
    ckpt_cloud.load({}, checkpoint_id=url)
    assert "COMMIT" in keys(url)


NAMES = [
    "a/b/c",
    "../../etc/passwd",
    "a.b..c.",
    "with space",
    "ünïcödé ✓ 模型",
    "n" * 2000,
    "quote\"back\\slash'",
    "tab\tnewline\n",
    "__metadata__",
    "w@0,0",
    "%2e%2e",
    "COMMIT",
    "",
]


def test_names(url):
    state = {name: torch.full((3,), float(i)) for i, name in enumerate(NAMES)}
    state |= {f"{name} item": i for i, name in enumerate(NAMES)}
    loaded = saved_and_loaded(state, url)
    assert all(torch.equal(loaded[name], state[name]) for name in NAMES)
    assert all(loaded[f"{name} item"] == i for i, name in enumerate(NAMES))


def test_packs_open_with_safetensors_alone(file_url, tmp_path):
    known = {
        "a/b": torch.randn(3, 4),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "n": torch.arange(4),
        "e": torch.empty(0),
    }
    ckpt_cloud.save({**known, "complex": torch.ones(2, dtype=torch.complex64)}, checkpoint_id=file_url)
    (pack,) = tmp_path.rglob("*.safetensors")
    opened = load_file(pack)
    assert all(torch.equal(opened[name], value) for name, value in known.items() if value.numel())
    assert opened["complex"].view(torch.complex64).tolist() == [1, 1]


def test_only_a_slice_of_the_bytes_is_fetched(file_url):
    """A partial load reads its own tensors and the blocks at their edges, not the rest."""
    state = {f"t{i}": torch.randn(1 << 20) for i in range(8)}
    ckpt_cloud.save(state, checkpoint_id=file_url)
    reader = ckpt_cloud.ObjectStoreReader(file_url)
    part = {"t3": torch.empty(1 << 20)}
    ckpt_cloud.load(part, storage_reader=reader)
    assert torch.equal(part["t3"], state["t3"])
    assert reader.report.bytes_needed == 4 << 20
    assert reader.report.amplification <= 1.2


@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable:UserWarning")
def test_dcp_rebuilds_the_state_from_the_checkpoint_alone(url):
    state = {"model": {"w": torch.randn(3, 4)}, "step": 5, "list": [torch.ones(2), "x"]}
    ckpt_cloud.save(state, checkpoint_id=url)
    load_from_keys = dcp.state_dict_loader._load_state_dict_from_keys
    rebuilt = load_from_keys(storage_reader=ckpt_cloud.ObjectStoreReader(url))
    assert torch.equal(rebuilt["model"]["w"], state["model"]["w"])
    assert rebuilt["step"] == 5
    assert torch.equal(rebuilt["list"][0], torch.ones(2))
    only = load_from_keys("model", storage_reader=ckpt_cloud.ObjectStoreReader(url))
    assert list(only) == ["model"]
