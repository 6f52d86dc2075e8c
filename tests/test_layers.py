"""Which weights T acts on, and the rows of what they are given: every kind of layer against what torch computes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from igm_rs import IGMOptimizer
from igm_rs import _igm_rs as rust
from igm_rs._features import FeatureTap
from igm_rs._layers import head_layers, pair, pair_all, projected_share, scope_layers
from igm_rs._modalities import Modalities


def modalities_of(spec, *also):
    """Modalities of a mapping from names to modules; `also` are held by the base, too."""
    modules = [*(m for members in spec.values() for m in (members if isinstance(members, list) else [members])), *also]
    return Modalities(spec, [{"params": list(nn.ModuleList(modules).parameters())}], {})


def layers_of(module, **options):
    """The layers of one module, the head of the one modality "a"."""
    return head_layers(modalities_of({"a": module}), {"a": module}, None, None, **options)["a"]


def heard(layers, reduce, call, augment=False):
    """Rows by layer of one call, and what the call returns."""
    tap = FeatureTap(layers, reduce, augment)
    result = call()
    rows = tap.take()
    tap.close()
    assert len({name for name, _ in rows}) == len(rows) == len(layers)
    return dict(rows), result


def check_gradient(layer, rows, gradients):
    """∇W = Σ over positions of (gradient of the output)ᵀ z, group by group; and the bias with a constant 1."""
    G, d = layer.groups, layer.features
    augmented = rows.shape[1] == G * (d + 1)
    z = rows.view(rows.shape[0], G, -1)
    by_group = gradients.reshape(rows.shape[0], G, -1)
    products = torch.einsum("ngo,ngd->god", by_group, z)
    matrix = layer.matrix(layer.weight.grad).reshape(G, -1, d)
    torch.testing.assert_close(products[..., :d], matrix, rtol=1e-9, atol=1e-9)
    if augmented:
        assert (z[..., d] == 1).all()
        torch.testing.assert_close(products[..., d], layer.vector(layer.bias.grad).reshape(G, -1), rtol=1e-9, atol=1e-9)


# -- convolutions -----------------------------------------------------------------------------------------------------

GEOMETRIES = [
    {"kernel_size": 3},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "dilation": 2, "padding": 2},
    {"kernel_size": 2, "padding": "same", "dilation": 3},  # asymmetric: 1 before, 2 behind
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
    {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 3},
    {"kernel_size": 3, "groups": 2},
    {"kernel_size": 3, "groups": 4, "padding": 1, "bias": False},  # depthwise
    {"kernel_size": 2, "stride": 2, "groups": 4},
]
CONVOLUTIONS = [(nn.Conv1d, (7,)), (nn.Conv2d, (6, 7)), (nn.Conv3d, (4, 5, 6))]
UNEVEN = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 3)}
CASES = [(kind, size, geometry) for kind, size in CONVOLUTIONS for geometry in GEOMETRIES]
CASES += [(nn.Conv2d, (6, 7), UNEVEN), (nn.Conv2d, (6, 7), UNEVEN | {"padding_mode": "circular", "groups": 2})]
EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own copy
NAMED = [f"{kind.__name__} {geometry}" for kind, _, geometry in CASES]


@EVEN
@pytest.mark.parametrize(("kind", "size", "geometry"), CASES, ids=NAMED)
@pytest.mark.parametrize("augment", [False, True])
def test_rows_of_a_convolution_make_its_gradient(kind, size, geometry, augment):
    conv = kind(4, 8, **geometry).double()
    (layer,) = layers_of(conv)
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    rows, y = heard([layer], "samples", lambda: conv(x), augment)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    seen = rows["a"]
    assert seen.shape[1] == layer.width + (layer.groups if augment and conv.bias is not None else 0)
    check_gradient(layer, seen, upstream.flatten(2).transpose(1, 2))


@EVEN
@pytest.mark.parametrize(("kind", "size", "geometry"), CASES, ids=NAMED)
def test_mean_rows_are_those_of_the_mean(kind, size, geometry):
    conv = kind(4, 8, **geometry).double()
    (layer,) = layers_of(conv)
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    mean, y = heard([layer], "mean", lambda: conv(x))
    every, _ = heard([layer], "samples", lambda: conv(x))
    rows = every["a"].view(3, -1, layer.width).mean(0)
    torch.testing.assert_close(mean["a"], rows, rtol=1e-12, atol=1e-12)
    assert mean["a"].shape[0] == y[0, 0].numel()


@EVEN
@pytest.mark.parametrize(("kind", "size", "geometry"), CASES, ids=NAMED)
def test_what_is_projected_out_of_the_weight_does_not_move_the_output(kind, size, geometry):
    """ΔW T = 0 on the rows: features whose rows were collected are treated as before."""
    conv = kind(4, 8, **geometry).double()
    (layer,) = layers_of(conv)
    x = torch.randn(1, 4, *size, dtype=torch.float64)
    rows, y = heard([layer], "mean", lambda: conv(x))
    z = rows["a"].view(-1, layer.groups, layer.features).transpose(0, 1)[:, :5]  # of the first five positions
    T = torch.eye(layer.features, dtype=torch.float64) - torch.linalg.pinv(z) @ z
    with torch.no_grad():
        matrix = layer.matrix(conv.weight)
        change = torch.randn_like(matrix)
        matrix += change @ (T if layer.groups > 1 else T[0])
    moved = (conv(x) - y).detach()[0].flatten(1)
    assert moved[:, :5].abs().max() < 1e-9
    if moved.shape[1] > 5 and layer.features > 8:
        assert moved.abs().max() > 1e-6


def test_unfold_of_torch_agrees():
    x = torch.randn(2, 3, 8, 9, dtype=torch.float64)
    rows = rust.conv_rows(x, "samples", (3, 2), (2, 1), ((1, 1), (2, 2)), (1, 3), "zeros")
    expected = functional.unfold(x, (3, 2), dilation=(1, 3), padding=(1, 2), stride=(2, 1))
    assert torch.equal(rows, expected.transpose(1, 2).reshape(-1, 18))


def test_conv_rows_by_hand(device):
    x = torch.tensor([[[1.0, 2, 3]], [[3, 4, 5]]], device=device)
    assert rust.conv_rows(x, "mean", [2], [1], [(0, 0)], [1], "zeros").tolist() == [[2, 3], [3, 4]]
    assert rust.conv_rows(x, "mean", [2], [2], [(0, 1)], [1], "zeros").tolist() == [[2, 3], [4, 0]]
    assert rust.conv_rows(x, "mean", [2], [1], [(1, 0)], [2], "circular").tolist() == [[4, 3], [2, 4]]
    two = torch.tensor([[[1.0, 2], [3, 4]]], device=device)
    assert rust.conv_rows(two, "samples", [2], [1], [(0, 0)], [1], "zeros", groups=2, augment=True).tolist() == [
        [1, 2, 1, 3, 4, 1]
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", ["mean", "samples"])
@pytest.mark.parametrize("layout", ["plain", "channels last", "strided"])
def test_rows_of_any_dtype_and_memory(device, dtype, reduce, layout):
    x = torch.randn(2, 4, 6, 10, device=device).to(dtype)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x[:, :, ::2, 1::2]
    kept = x.clone()
    rows = rust.conv_rows(x, reduce, (2, 2), (1, 2), ((1, 1), (0, 0)), (1, 1), "zeros", 2)
    assert rows.dtype == (torch.float64 if device.type == "cpu" or dtype == torch.float64 else torch.float32)
    z = x.double().mean(0, keepdim=True) if reduce == "mean" else x.double()
    expected = functional.unfold(z, 2, padding=(1, 0), stride=(1, 2)).transpose(1, 2).flatten(0, 1)
    tolerance = 1e-12 if rows.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(rows.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(x, kept)
    assert not rows.requires_grad


@pytest.mark.parametrize("reduce", ["mean", "samples"])
def test_an_empty_batch_gives_no_row(device, reduce):
    x = torch.zeros(0, 4, 5, device=device)
    assert rust.conv_rows(x, reduce, [3], [1], [(1, 1)], [1], "zeros", 2, augment=True).shape == (0, 14)
    assert rust.batch_rows(x, reduce, augment=True).shape == (0, 6)


def test_augmented_rows_by_hand(device):
    x = torch.tensor([[1.0, 2], [3, 6]], device=device)
    assert rust.batch_rows(x, "mean", augment=True).tolist() == [[2, 4, 1]]
    assert rust.batch_rows(x.half(), "samples", True).tolist() == [[1, 2, 1], [3, 6, 1]]


X = torch.zeros(2, 4, 5)
BAD_GEOMETRIES = [
    ((torch.zeros(4, 5), "mean", [3], [1], [(0, 0)], [1], "zeros"), ["features", "(4, 5)", "3 dimensions"]),
    ((X.long(), "mean", [3], [1], [(0, 0)], [1], "zeros"), ["features", "int64"]),
    ((X[:, :0], "mean", [3], [1], [(0, 0)], [1], "zeros"), ["features", "(2, 0, 5)", "C ≥ 1"]),
    ((X, "mean", [7], [1], [(0, 1)], [1], "zeros"), ["features", "(2, 4, 5)", "room for a kernel of [7]"]),
    ((X, "median", [3], [1], [(0, 0)], [1], "zeros"), ["reduce", "median"]),
    ((X, "mean", [], [], [], [], "zeros"), ["kernel", "0 sizes", "one to three"]),
    ((X, "mean", [0], [1], [(0, 0)], [1], "zeros"), ["kernel", "[0]", "≥ 1"]),
    ((X, "mean", [3], [0], [(0, 0)], [1], "zeros"), ["stride", "[0]", "≥ 1"]),
    ((X, "mean", [3], [1], [(0, 0)], [1, 1], "zeros"), ["dilation", "[1, 1]", "1 numbers"]),
    ((X, "mean", [3], [1], [(0, -1)], [1], "zeros"), ["padding", "(0, -1)", "≥ 0"]),
    ((X, "mean", [3], [1], [(0, 0)], [1], "mirror"), ["mode", "mirror", "reflect"]),
    ((X, "mean", [3], [1], [(0, 0)], [1], "zeros", 3), ["groups", "3", "divisor of the 4 channels"]),
    ((X, "mean", [3], [1], [(0, 0)], [1], "zeros", 0), ["groups", "0", "divisor"]),
]


@pytest.mark.parametrize(("arguments", "fragments"), BAD_GEOMETRIES, ids=[" ".join(row[1]) for row in BAD_GEOMETRIES])
def test_errors_of_conv_rows(arguments, fragments):
    with pytest.raises(ValueError, match=fragments[0]) as caught:
        rust.conv_rows(*arguments)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("groups", [1, 2])
def test_memory_that_no_matrix_can_view_keeps_its_last_dimensions(groups):
    """Channels last: a view all the same, so that what is written to it is written to the tensor."""
    conv = nn.Conv2d(4, 6, 3, groups=groups).to(memory_format=torch.channels_last)
    (layer,) = layers_of(conv)
    matrix = layer.matrix(conv.weight.detach())
    assert matrix.data_ptr() == conv.weight.data_ptr()
    shape = (6,) if groups == 1 else (2, 3)
    assert matrix.shape[: len(shape)] == shape
    torch.testing.assert_close(
        matrix.reshape(*shape, -1), conv.weight.detach().contiguous().view(*shape, layer.features)
    )


# -- Linear, Conv1D and attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("augment", [False, True])
def test_linear_takes_any_leading_dimensions(shape, augment):
    linear = nn.Linear(4, 5).double()
    (layer,) = layers_of(linear)
    x = torch.randn(*shape, 4, dtype=torch.float64)
    rows, y = heard([layer], "samples", lambda: linear(input=x), augment)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    check_gradient(layer, rows["a"], upstream.reshape(-1, 5))
    mean, _ = heard([layer], "mean", lambda: linear(x))
    batch = x if x.dim() > 1 else x[None]
    torch.testing.assert_close(mean["a"], batch.mean(0).reshape(-1, 4))


@pytest.mark.parametrize("augment", [False, True])
def test_conv1d_of_transformers_is_a_linear_with_its_weight_the_other_way(augment):
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    linear = pytorch_utils.Conv1D(5, 4).double()
    (layer,) = layers_of(linear)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    rows, y = heard([layer], "samples", lambda: linear(x), augment)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert (layer.features, layer.transposed) == (4, True)
    assert layer.matrix(linear.weight).shape == (5, 4)
    check_gradient(layer, rows["a"], upstream.reshape(-1, 5))
    normed = parametrizations.weight_norm(pytorch_utils.Conv1D(5, 4))
    assert layers_of(normed)[0].weight is normed.parametrizations.weight.original1


class Attention(nn.MultiheadAttention):
    """Attention whose projections are computed one by one, so that their gradients are told."""

    def projections(self, query, key, value):
        E = self.embed_dim
        weights = (
            self.in_proj_weight.split(E)
            if self.in_proj_weight is not None
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(E)
        given = zip((query, key, value), weights, biases, strict=True)
        return [functional.linear(z, W, b) for z, W, b in given]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("unbatched", [True, False])
@pytest.mark.parametrize("augment", [True, False])
def test_attention_has_four_layers(packed, batch_first, unbatched, augment):
    sizes = {} if packed else {"kdim": 5, "vdim": 7}
    attention = Attention(6, 2, batch_first=batch_first, dropout=0.5, **sizes).double()
    nn.init.normal_(attention.in_proj_bias)
    layers = layers_of(attention)
    assert [layer.name for layer in layers] == ["a.q", "a.k", "a.v", "a.out_proj"]
    assert [layer.features for layer in layers] == ([6, 6, 6, 6] if packed else [6, 5, 7, 6])
    q, k, v, out = layers
    query = torch.randn(3, 4, 6, dtype=torch.float64)
    key = torch.randn(3, 5, 6 if packed else 5, dtype=torch.float64)
    value = torch.randn(3, 5, 6 if packed else 7, dtype=torch.float64)
    batch = (query, key, value)
    given = [z[0] for z in batch] if unbatched else [z if batch_first else z.transpose(0, 1) for z in batch]
    inside = [z[:1] for z in batch] if unbatched else list(batch)
    state = torch.get_rng_state()
    rows, _ = heard(layers, "samples", lambda: attention(given[0], value=given[2], key=given[1]), augment)
    torch.set_rng_state(state)
    attention(given[0], given[1], given[2])
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    heard(layers, "samples", lambda: attention(*given))
    assert torch.equal(torch.get_rng_state(), after)  # the pass for out_proj's features draws nothing
    made = attention.projections(*inside)
    for layer, y in zip((q, k, v), made, strict=True):
        attention.zero_grad()
        upstream = torch.randn_like(y)
        y.backward(upstream)
        check_gradient(layer, rows[layer.name], upstream.reshape(-1, 6))
        for other in {q, k, v} - {layer}:
            assert other.matrix(layer.weight.grad).count_nonzero() == 0 or not packed
            assert other.vector(layer.bias.grad).count_nonzero() == 0
    attention.eval()
    expected, _ = attention(*given)
    z = rows[out.name][:, :6]
    y = functional.linear(z, out.weight, out.bias)
    y = y.view(1 if unbatched else 3, -1, 6)
    y = y[0] if unbatched else y if batch_first else y.transpose(0, 1)
    torch.testing.assert_close(y, expected)


def test_attention_with_masks_and_more():
    attention = nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True, bias=False, batch_first=True).double()
    nn.init.normal_(attention.bias_k)
    layers = layers_of(attention)
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    options = {
        "key_padding_mask": torch.tensor([[False, False, False, True]] * 3),
        "attn_mask": torch.ones(4, 4, dtype=torch.bool).triu(1),
    }
    rows, (expected, _) = heard(layers, "samples", lambda: attention(x, x, x, need_weights=False, **options))
    torch.testing.assert_close(rows["a.out_proj"].view(3, 4, 6) @ attention.out_proj.weight.T, expected)
    assert all(layer.bias is None for layer in layers)
    assert rows["a.q"] is rows["a.k"] is rows["a.v"]  # one tensor, one set of rows
    causal, (expected, _) = heard(layers, "samples", lambda: attention(x, x, x, is_causal=True, **options))
    torch.testing.assert_close(causal["a.out_proj"].view(3, 4, 6) @ attention.out_proj.weight.T, expected)


def test_the_attended_are_made_only_where_out_proj_is_projected(monkeypatch):
    attention = nn.MultiheadAttention(4, 2)
    passes = []
    forward = functional.multi_head_attention_forward
    monkeypatch.setattr(
        "igm_rs._kinds.multi_head_attention_forward", lambda *a, **k: (passes.append(1), forward(*a, **k))[1]
    )
    layers = layers_of(attention)
    x = torch.randn(3, 2, 4)
    heard(layers[:3], "mean", lambda: attention(x, x, x))
    assert not passes
    tap = FeatureTap(layers, "mean")
    for listens in (False, True):
        tap.muted = not listens
        attention(x, x, x)
        assert len(passes) == listens
    attention.eval()(x, x, x)
    assert len(passes) == 1


def test_transformer_layers_are_heard_in_evaluation_too():
    """torch has a fast path that calls no attention; hooks keep it away."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    layers = layers_of(encoder)
    assert [layer.relative for layer in layers] == [
        "self_attn.q",
        "self_attn.k",
        "self_attn.v",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]
    tap = FeatureTap(layers, "mean")
    seen = []
    tap.sink = lambda name, rows: seen.append((name, tuple(rows.shape)))
    with torch.no_grad():
        encoder.eval()(torch.randn(3, 5, 8))
    assert [name for name, _ in seen] == [layer.name for layer in layers]
    assert [shape for _, shape in seen] == [(5, 8)] * 5 + [(5, 16)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_inference_are_padded_with_zeros():
    """A padding mask makes torch's encoder nest its input where nothing is trained."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).double().eval()
    layers = layers_of(model)
    tap = FeatureTap(layers, "samples")
    seen = {}
    tap.sink = seen.__setitem__
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    missing = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        model(x, src_key_padding_mask=missing)
        nested = dict(seen)
        with torch.enable_grad():
            model(x, src_key_padding_mask=missing)
    there = ~missing.flatten()
    assert len(nested) == 6
    for name, rows in nested.items():
        torch.testing.assert_close(rows[there], seen[name][there], msg=name)
    assert nested["a.layers.0.linear1"][~there].count_nonzero() == 0


# -- parametrised weights ---------------------------------------------------------------------------------------------

PARAMETRISED = {
    "weight_norm": (parametrizations.weight_norm, lambda m: m.parametrizations.weight.original1),
    "weight_norm of all": (
        lambda m: parametrizations.weight_norm(m, dim=None),
        lambda m: m.parametrizations.weight.original1,
    ),
    "spectral_norm": (parametrizations.spectral_norm, lambda m: m.parametrizations.weight.original),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 2), lambda m: m.weight_orig),
    "old spectral_norm": (nn.utils.spectral_norm, lambda m: m.weight_orig),
}


@pytest.mark.parametrize("way", PARAMETRISED)
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 5), lambda: nn.Conv2d(4, 6, 3, groups=2)], ids=["Linear", "Conv2d"]
)
def test_of_a_parametrised_weight_the_trained_tensor_is_projected(make, way):
    apply, of = PARAMETRISED[way]
    module = apply(make())
    (layer,) = layers_of(module)
    assert layer.weight is of(module)
    assert layer.bias is module.bias
    assert layer.matrix(layer.weight).shape == ((5, 4) if isinstance(module, nn.Linear) else (2, 3, 18))


def test_old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        module = nn.utils.weight_norm(nn.Linear(4, 5))
    (layer,) = layers_of(module)
    assert layer.weight is module.weight_v


def test_attention_with_parametrised_weights_stays_as_it_was():
    """The second pass makes no power iteration: what the weights are made from moves once a forward pass."""
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(parametrizations.spectral_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"))
    first, second = modules
    layers = layers_of(first)
    x = torch.randn(3, 2, 4)
    rows, result = heard(layers, "samples", lambda: first(x, x, x))
    assert torch.equal(result[0], second(x, x, x)[0])
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert first.training
    assert all(module.training for module in first.modules())
    assert rows["a.out_proj"].shape == (6, 4)
    assert len({id(layer.weight) for layer in layers[:3]}) == 1


# -- refusals ---------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A matrix that is used in a way that nobody knows."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ConvTranspose2d(2, 2, 3),
        lambda: nn.Bilinear(3, 3, 2),
        lambda: nn.LSTM(3, 3),
        lambda: nn.GRUCell(3, 3),
        lambda: nn.LazyLinear(3),
        lambda: nn.LazyConv2d(3, 2),
        Table,
    ],
)
@pytest.mark.parametrize("how", ["heads", "scope"])
def test_a_kind_that_cannot_be_projected_is_named(make, how):
    module = nn.Sequential(nn.Linear(3, 3), make())
    kind = type(module[1]).__name__
    members = modalities_of({"a": module})
    with pytest.raises(ValueError, match=f"takes in layer 'a.1', a {kind}.*expected"):
        if how == "heads":
            head_layers(members, {"a": module}, None, None)
        else:
            scope_layers(members, 1.0, None)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(1, 3)), "2"),
        (lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"), None),
        (lambda: nn.utils.parametrize.register_parametrization(nn.Linear(4, 3), "weight", Halves()), "no"),
    ],
)
def test_a_parametrised_weight_needs_one_tensor_of_its_shape(make, count):
    if count is None:
        assert len(layers_of(make())) == 1
        return
    with pytest.raises(ValueError, match=rf"layer 'a' with a parametrised weight.*{count} parameters of its shape"):
        layers_of(make())


class Halves(nn.Module):
    """A weight made from two halves."""

    def forward(self, left, right):
        return torch.cat([left, right], 1)

    def right_inverse(self, weight):
        return weight[:, :2].clone(), weight[:, 2:].clone()


def test_norms_embeddings_and_vectors_are_passed_over():
    module = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU(), nn.EmbeddingBag(4, 3))
    assert [layer.name for layer in layers_of(module)] == ["a.1"]
    members = modalities_of({"a": module})
    assert [layer.name for layer in scope_layers(members, 1.0, None)["a"]] == ["a.1"]
    with pytest.raises(ValueError, match=r"the head 'a' \(LayerNorm\) has no layer to project"):
        layers_of(nn.LayerNorm(3))


def test_two_layers_of_one_name_are_refused():
    one, two = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    members = modalities_of({"a": one, "a.0": two})
    with pytest.raises(ValueError, match=r"two projected layers are called 'a\.0', expected model="):
        head_layers(members, {"a": one, "a.0": two}, None, None)


# -- scope and share --------------------------------------------------------------------------------------------------


def network():
    """With 18+2, 4, 18+2, (12+6)+(4+2) and 6+3 parameters, of weight and bias."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Conv2d(2, 2, 3, groups=2),
        nn.MultiheadAttention(2, 1),
        nn.Linear(2, 3),
    )


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        (0.0, []),
        (9 / 77, ["4"]),
        (10 / 77, ["3.out_proj", "4"]),
        (16 / 77, ["3.v", "3.out_proj", "4"]),
        (33 / 77, ["3.q", "3.k", "3.v", "3.out_proj", "4"]),
        (34 / 77, ["2", "3.q", "3.k", "3.v", "3.out_proj", "4"]),
        (1.0, ["0", "2", "3.q", "3.k", "3.v", "3.out_proj", "4"]),
    ],
)
def test_scope_takes_every_kind(scope, names):
    model = network()
    members = modalities_of({"a": model})
    assert sum(p.numel() for p in model.parameters()) == 77
    layers = scope_layers(members, scope, model)
    assert [layer.name for layer in layers["a"]] == names
    assert [layer.relative for layer in layers["a"]] == names


def test_the_projected_share():
    model = network()
    members = modalities_of({"a": model, "b": nn.Linear(2, 2)})
    layers = scope_layers(members, 1.0, None)
    assert projected_share(members, layers) == {"a": (18 + 18 + 16 + 6) / 77, "b": 4 / 6}
    assert projected_share(members, layers, augment=True) == {"a": (77 - 4) / 77, "b": 1.0}
    assert projected_share(members, {"a": [], "b": layers["b"] * 2}) == {"a": 0.0, "b": 4 / 6}
    model[4].bias.requires_grad_(False)
    members = modalities_of({"a": model})
    assert projected_share(members, scope_layers(members, 1.0, None), augment=True) == {"a": (74 - 4) / 74}


# -- tied weights -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two Linear layers with one weight, and an embedding that has it, too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 3)
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight = self.table.weight

    def forward(self, x):
        return self.two(self.one(x))


def test_tied_weights_are_one_layer_that_listens_everywhere():
    model = Tied()
    members = modalities_of({"a": model})
    for layers in (head_layers(members, {"a": model}, None, model), scope_layers(members, 0.1, model)):
        (layer,) = layers["a"]
        assert layer.modules == (model.one, model.two)
    assert projected_share(modalities_of({"a": model}), {"a": [layer]}) == {"a": 9 / 12}
    tap = FeatureTap([layer], "mean")
    model(torch.randn(4, 3))
    rows = tap.take()
    assert [name for name, _ in rows] == [layer.name] * 2
    assert not torch.equal(rows[0][1], rows[1][1])


def test_weights_tied_across_modalities_are_one_layer():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    layers = head_layers(modalities_of({"a": a, "b": b}), {"a": a, "b": b}, None, None)
    assert layers["a"] == layers["b"]
    assert layers["a"][0].modules == (a, b)
    assert pair("a", "b", layers) == [(layers["a"][0],) * 2]


def test_convolutions_with_one_weight_look_at_their_inputs_in_their_own_way():
    near, far = nn.Conv1d(2, 2, 3, padding=1).double(), nn.Conv1d(2, 2, 3, dilation=2, padding=2).double()
    far.weight = near.weight
    (layer,) = layers_of(nn.Sequential(near, far))
    tap = FeatureTap([layer], "samples")
    x = torch.randn(2, 2, 5, dtype=torch.float64)
    y = near(x), far(x)
    rows = torch.cat([rows for _, rows in tap.take()])
    upstream = [torch.randn_like(one) for one in y]
    torch.autograd.backward(y, upstream)
    check_gradient(layer, rows, torch.cat([one.flatten(2).transpose(1, 2).reshape(-1, 2) for one in upstream]))


def test_tied_weights_of_unlike_layers_are_refused():
    plain, grouped = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3, groups=2)
    grouped.weight = plain.weight
    with pytest.raises(
        ValueError, match=r"layer 'a.0', d = 6 in 1 groups, whose weight is tied to a Conv1d with d = 6 in 2"
    ):
        layers_of(nn.Sequential(plain, grouped))


# -- pairing ----------------------------------------------------------------------------------------------------------


def two_sides(a, b):
    """Layers of two modalities."""
    return head_layers(modalities_of({"a": a, "b": b}), {"a": a, "b": b}, None, None)


def names(pairs):
    return [(mine.name, theirs.name) for mine, theirs in pairs]


def heads():
    return (
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)),
    )


def test_pairing_by_position():
    layers = two_sides(*heads())
    assert names(pair("a", "b", layers)) == [("a.1", "b.0"), ("a.2", "b.1")]
    grouped = two_sides(nn.Conv1d(4, 4, 3, groups=2), nn.Conv1d(2, 4, 3))
    with pytest.raises(ValueError, match=r"no layer in common: 'a' \(d = 6, 2 groups\) against 'b' \(d = 6\)"):
        pair("a", "b", grouped)


def test_pairing_by_name():
    a, b = heads()
    layers = two_sides(a, nn.Sequential(nn.Linear(8, 8), b[0]))
    assert names(pair("a", "b", layers, "name")) == [("a.0", "b.0"), ("a.1", "b.1")]
    with pytest.raises(
        ValueError, match=r"gives 'a.1' \(d = 8\) the T of 'b.1' \(d = 6\), expected equal widths.*'a.2'"
    ):
        pair("a", "b", two_sides(*heads()), "name")
    with pytest.raises(ValueError, match=r"no layer in common.*layers of the same path below both"):
        pair("a", "b", two_sides(nn.Sequential(nn.Tanh(), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))), "name")


def test_pairing_by_name_of_shared_and_several_roots():
    trunk, a, b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)
    layers = two_sides([trunk, a], [trunk, b])
    assert [layer.relative for layer in layers["a"] + layers["b"]] == ["0", "1", "0", "1"]
    assert names(pair("a", "b", layers, "name")) == [("a.0", "a.0"), ("a.1", "b.1")]


def test_pairing_by_shape_is_that_of_the_released_code():
    a = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    b = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    layers = two_sides(a, b)
    assert names(pair("a", "b", layers, "shape")) == [("a.0", "b.0"), ("a.0", "b.1")]
    assert names(pair("b", "a", layers, "shape")) == [("b.0", "a.0"), ("b.1", "a.0")]
    with pytest.raises(ValueError, match=r"no layer in common.*a weight of the same shape in both"):
        pair("a", "b", two_sides(a[1], b[2]), "shape")


def test_pairing_by_mapping():
    layers = two_sides(*heads())
    flat = {"a.1": "b.0", "a.2": None, "b.0": "a.1"}
    assert names(pair("a", "b", layers, flat)) == [("a.1", "b.0")]
    assert names(pair("b", "a", layers, flat)) == [("b.0", "a.1")]
    assert names(pair("a", "b", layers, {"a": {"a.0": "b.0"}})) == [("a.0", "b.0")]
    assert pair("a", "b", layers, {"a.0": None}) == []
    assert [names(one) for one in pair_all("a", ["b"], layers, flat)] == [[("a.1", "b.0")]]
    assert pair_all("a", [], layers, flat) == []


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({"a.7": "b.0"}, ValueError, r"pairing names 'a.7', expected layers: 'a' has 'a.0' \(d = 8\), .*'b' has 'b.0'"),
        ({"a.0": "b.7"}, ValueError, "pairing names 'b.7', expected layers"),
        ({"a.0": "b.1"}, ValueError, r"gives 'a.0' \(d = 8\) the T of 'b.1' \(d = 6\), expected equal widths"),
        ({"b.0": "a.1"}, ValueError, "pairing says nothing of 'a', expected an entry"),
        ({}, ValueError, "pairing says nothing of 'a', expected an entry"),
        ({"a": {"b.0": "a.1"}}, ValueError, "pairing names 'b.0', expected layers"),
        ({"a": {"a.0": "b.0"}, "a.1": "b.0"}, ValueError, "layers alone, or modalities alone"),
        ({"c": {"a.0": "b.0"}}, ValueError, "layers alone, or modalities alone"),
        (
            {"a.0": "a.0"},
            ValueError,
            "pairing maps 'a.0' of 'a' to 'a.0', expected a layer of one of its sources: 'b' has",
        ),
        ("width", ValueError, "pairing is 'width', expected 'position', 'name', 'shape' or a mapping"),
        (3, TypeError, "pairing is a int, expected a word or a mapping"),
    ],
)
def test_bad_pairings_are_refused(rule, error, message):
    with pytest.raises(error, match=message):
        pair_all("a", ["b"], two_sides(*heads()), rule)


# -- taps -------------------------------------------------------------------------------------------------------------


def test_a_tap_learns_of_further_layers():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    members = modalities_of({"a": first}, second)
    layers = head_layers(members, {"a": first}, None, None)
    tap = FeatureTap(layers["a"], "mean")
    second.weight = first.weight
    later = modalities_of({"a": first, "b": second})
    more = head_layers(later, {"b": second}, None, None, names=["b"], known=layers["a"])
    assert more["b"] == layers["a"]
    tap.add(more["b"])
    tap.add(more["b"])
    for module in (first, second):
        module(torch.randn(2, 3))
    assert [name for name, _ in tap.take()] == ["a", "a"]
    assert len(first._forward_pre_hooks) == len(second._forward_pre_hooks) == 1
    tap.close()
    assert not first._forward_pre_hooks
    assert not second._forward_pre_hooks


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_listens_at_the_copied_layers_alone(how):
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Conv1d(2, 2, 3, groups=2))
    layers = layers_of(model)
    tap = FeatureTap(layers, "samples", augment=True)
    twin, theirs, other = how((model, layers, tap))
    x = torch.randn(3, 2, 4)
    for attention, conv in (model, twin):
        attention(x, x, x)
        conv(x)
    assert [one.weight is two for one, two in zip(theirs[-1:], [twin[1].weight], strict=True)] == [True]
    for listening in (tap, other):
        rows = listening.take()
        assert [name for name, _ in rows] == ["a.0.q", "a.0.k", "a.0.v", "a.0.out_proj", "a.1"]
        assert [tuple(one.shape) for _, one in rows] == [(6, 5)] * 4 + [(6, 8)]
    alone = copy.deepcopy(model)
    alone[0](x, x, x)
    assert not alone[0]._forward_pre_hooks
    assert not tap.take()


def test_activation_checkpointing_counts_a_forward_pass_once():
    conv = nn.Conv1d(2, 2, 3)
    tap = FeatureTap(layers_of(conv), "mean")
    x = torch.randn(3, 2, 5, requires_grad=True)
    torch.utils.checkpoint.checkpoint(conv, x, use_reentrant=False).sum().backward()
    assert len(tap.take()) == 1


def test_one_call_of_rust_for_each_layer_and_forward_pass(monkeypatch):
    calls = []
    for name in ("batch_rows", "conv_rows"):
        function = getattr(rust, name)
        monkeypatch.setattr(rust, name, lambda *a, f=function, n=name: (calls.append(n), f(*a))[1])
    model = nn.Sequential(nn.Conv1d(2, 2, 3), nn.Linear(3, 3))
    tap = FeatureTap(layers_of(model), "mean", augment=True)
    model(torch.randn(2, 2, 5))
    assert calls == ["conv_rows", "batch_rows"]
    assert len(tap.take()) == 2


def test_an_optimizer_takes_convolutions():
    model = nn.ModuleDict({n: nn.Sequential(nn.Conv1d(2, 2, 3), nn.Flatten(), nn.Linear(6, 3)) for n in ("a", "b")})
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = IGMOptimizer(base, dict(model), scope=1.0)
    assert opt.pairs["a"] == {"b": [("a.0", "b.0"), ("a.2", "b.2")]}
