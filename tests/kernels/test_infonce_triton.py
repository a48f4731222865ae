"""The Triton engine against the definition in float64: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmemb.kernels import _tiles, infonce, infonce_with_grads
from tests.kernels.cases import OPTIONS, arguments, combinations, error, oracle, unit_rows
from tests.kernels.interpreted import interpreter, on_cuda

Call = Callable[..., Any]

FIELDS = ("loss", "query_grad", "candidate_grad", "temperature_grad")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    with interpreter() as run:
        yield run


@pytest.fixture(scope="module", params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def call(request: pytest.FixtureRequest) -> Call:
    """Runs a function of tensors where Triton's kernels run."""
    return on_cuda if request.param == "cuda" else request.getfixturevalue("interpreted")


def solve(call: Call, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return tuple(call(infonce_with_grads, *args, engine="triton", **kwargs))


def check(call: Call, shape: tuple[int, int, int], temperature: float, allowed: float, **kwargs: Any) -> None:
    """Loss and gradients equal the definition's to a relative error, and a second run's to the last bit."""
    n, m, d = shape
    dtype = kwargs.pop("dtype", torch.float32)
    query, candidate = unit_rows(n, d, dtype), unit_rows(m, d, dtype)
    temperature = float(torch.tensor(temperature))
    given = solve(call, query, candidate, temperature=temperature, **kwargs)
    again = solve(call, query, candidate, temperature=temperature, **kwargs)
    kwargs.pop("workspace_bytes", None)
    expected = oracle(query, candidate, temperature, **kwargs)
    # Logits of 1 / temperature carry float32's relative error into exponents.
    allowed += 2 * torch.finfo(torch.float32).eps / temperature
    for name, value, wanted in zip(FIELDS, given, expected, strict=True):
        # Normalised rows of width 1 are all 1 or -1, so gradients cancel but for the rounding of their terms.
        least = temperature ** (-2 if name == "temperature_grad" else -1) if d == 1 else 1e-2
        assert error(value, wanted, least=least) < allowed, name
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


@pytest.mark.parametrize(("shape", "options", "temperature"), combinations(24), ids=str)
def test_every_option_equals_the_definition(
    call: Call, shape: tuple[int, int, int], options: frozenset[str], temperature: float
) -> None:
    check(call, shape, temperature, 1e-5, **arguments(options, shape))


@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_tiles_and_slabs_of_any_number(call: Call, symmetric: bool, temperature: float) -> None:
    # One more than two tiles of rows, one less than three of columns; a slab of one tile's size.
    shape = (257, 383, 130)
    options = arguments(frozenset(OPTIONS) - {"dims", "symmetric"}, shape)
    check(call, shape, temperature, 1e-5, symmetric=symmetric, workspace_bytes=100_000, **options)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("options", [frozenset(), frozenset(["symmetric"]), frozenset(OPTIONS) - {"dims"}], ids=len)
def test_16_bits(call: Call, options: frozenset[str], dtype: torch.dtype, allowed: float) -> None:
    shape = (61, 131, 24)
    check(call, shape, 0.05, allowed, dtype=dtype, **arguments(options, shape))


@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_a_low_temperature_does_not_overflow(call: Call, symmetric: bool) -> None:
    query = unit_rows(5, 4, torch.float32)
    given = solve(call, query, -query, temperature=1e-3, symmetric=symmetric)
    assert all(bool(value.isfinite().all()) for value in given)
    assert float(given[0]) > 88  # where float32's exp overflows


@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_small_losses_keep_their_relative_precision(call: Call, symmetric: bool) -> None:
    query = torch.eye(6)
    given = solve(call, query, query, temperature=0.025, symmetric=symmetric)
    exact = 5 * torch.tensor(-40.0, dtype=torch.float64).exp()
    torch.testing.assert_close(given[0].double(), exact, rtol=1e-5, atol=0)
    off_diagonal = ~torch.eye(6, dtype=torch.bool)
    expected = torch.full((30,), float(exact) / 5 / 6 / 0.025)
    torch.testing.assert_close(given[1][off_diagonal], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_rows_with_nothing_but_left_out_negatives_have_no_loss(call: Call, symmetric: bool) -> None:
    ids = {"query_id": torch.zeros(3, dtype=torch.int64), "candidate_id": torch.zeros(3, dtype=torch.int64)}
    rows = unit_rows(3, 4, torch.float32)
    for value in solve(call, rows, rows, temperature=0.001, symmetric=symmetric, **ids):
        torch.testing.assert_close(value, torch.zeros_like(value))


def numerical(symmetric: bool, reduction: str) -> bool:
    """gradcheck in float64, which the interpreter multiplies exactly and no GPU kernel of ours takes."""
    torch.manual_seed(0)
    options = arguments(frozenset(OPTIONS) - {"hardness", "symmetric", "dims"}, (5, 8, 4))
    leaves = [unit_rows(5, 4, torch.float64), unit_rows(8, 4, torch.float64), torch.tensor(0.3, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def loss(query: Tensor, candidate: Tensor, temperature: Tensor) -> Tensor:
        how: dict[str, Any] = {"symmetric": symmetric, "reduction": reduction, "engine": "triton"}
        return infonce(query, candidate, temperature=temperature, **options, **how)

    return torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_gradcheck_in_the_interpreter(interpreted: Call, symmetric: bool, reduction: str) -> None:
    assert interpreted(numerical, symmetric, reduction)


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    rows = unit_rows(3, 4, torch.float32)
    with pytest.raises(ValueError, match="engine 'triton' needs a CUDA device and query is on cpu"):
        infonce(rows, rows, temperature=0.1, engine="triton")


@pytest.mark.gpu
def test_large_problems_on_a_gpu() -> None:
    # Full tiles, many slabs and the copy engine, against the tiled engine in float32.
    query, candidate = unit_rows(5003, 512, torch.bfloat16).cuda(), unit_rows(9001, 512, torch.bfloat16).cuda()
    for symmetric in (False, True):
        kwargs: dict[str, Any] = {"temperature": 0.02, "symmetric": symmetric}
        expected = infonce_with_grads(query.float(), candidate.float(), engine="tiled", **kwargs)
        given = infonce_with_grads(query, candidate, workspace_bytes=16 * 2**20, engine="triton", **kwargs)
        for name, a, b in zip(FIELDS, given, expected, strict=True):
            assert error(a, b.double()) < 1e-2, name


@pytest.mark.gpu
def test_memory_on_a_gpu_stays_within_the_workspace() -> None:
    query = unit_rows(16384, 64, torch.bfloat16).cuda()
    infonce_with_grads(query[:512], query[:512], temperature=0.02, engine="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    workspace = 64 * 2**20
    infonce_with_grads(query, query, temperature=0.02, symmetric=True, workspace_bytes=workspace, engine="triton")
    of_embeddings = 16 * query.numel() * query.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.5 * workspace + of_embeddings


def test_the_table_has_a_line_for_every_chip_and_16_and_32_bits() -> None:
    chips = {"sm_80", "sm_90", "sm_100", "unaligned", "amd", "interpreter"}
    assert set(_tiles.TILES) == {(chip, size) for chip in chips for size in (2, 4)} | {("interpreter", 8)}
    assert _tiles.choose(torch.device("cpu"), torch.float32, 7) == _tiles.TILES["interpreter", 4]


def test_rows_that_the_copy_engine_cannot_read_take_another_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "chip", lambda device: "sm_90")
    for width, line in ((8, "sm_90"), (9, "unaligned")):
        assert _tiles.choose(torch.device("cuda"), torch.bfloat16, width) == _tiles.TILES[line, 2]
    assert _tiles.choose(torch.device("cuda"), torch.float64, 8) is None
