"""The Triton engine against the definition in float64: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import importlib
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from benchmarks import harness
from mmemb.kernels import engines
from mmemb.kernels.problem import Columns, Merge, Peers, Problem, work_dtype
from mmemb.kernels.triton import tiles as _tiles
from mmemb.kernels.triton.launch import multiplies_mixed
from tests.unit.kernels.cases import OPTIONS, arguments, combinations, doubled, error, grads, loss, oracle, unit_rows
from tests.unit.kernels.interpreted import interpreter, on_cuda

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
    return tuple(call(grads, *args, engine="triton", **kwargs))


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


def named(value: object) -> str:
    """The same in every process: a set's own order is not."""
    return "+".join(sorted(value)) or "plain" if isinstance(value, frozenset) else str(value)


@pytest.mark.parametrize(("shape", "options", "temperature"), combinations(24), ids=named)
def test_every_option_equals_the_definition(
    call: Call, shape: tuple[int, int, int], options: frozenset[str], temperature: float
) -> None:
    check(call, shape, temperature, 1e-5, **arguments(options, shape))


@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_tiles_and_slabs_of_any_number(call: Call, symmetric: bool, temperature: float) -> None:
    # One more than a tile of rows, one more than two of columns; a slab of one tile's size.
    shape = (129, 257, 130)
    options = arguments(frozenset(OPTIONS) - {"dims", "symmetric"}, shape)
    check(call, shape, temperature, 1e-5, symmetric=symmetric, workspace_bytes=100_000, **options)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("options", [frozenset(), frozenset(["symmetric"]), frozenset(OPTIONS) - {"dims"}], ids=len)
def test_16_bits(call: Call, options: frozenset[str], dtype: torch.dtype, allowed: float) -> None:
    shape = (61, 131, 24)
    check(call, shape, 0.05, allowed, dtype=dtype, **arguments(options, shape))


@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_16_bits_with_a_common_mean(call: Call, symmetric: bool, temperature: float) -> None:
    """What a row of G misses to a sum of 0 multiplies the mean, three times as long as the rest at a cosine of 0.9."""
    mean = unit_rows(1, 64, torch.float64)
    query, candidate = ((3 * mean + unit_rows(131, 64, torch.float64)) / 10**0.5 for _ in range(2))
    query, candidate = query.bfloat16(), candidate.bfloat16()
    temperature = float(torch.tensor(temperature))
    given = solve(call, query, candidate, temperature=temperature, symmetric=symmetric)
    expected = oracle(query, candidate, temperature, symmetric=symmetric)
    for value, wanted in zip(given[1:3], expected[1:3], strict=True):
        assert error(value, wanted) < 4e-3  # half an eps


@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("options", [frozenset(), frozenset(OPTIONS)], ids=len)
def test_prefixes_of_16_bits_are_not_rounded_again(call: Call, options: frozenset[str], temperature: float) -> None:
    shape = (23, 31, 24)
    check(call, shape, temperature, 1e-2, dtype=torch.bfloat16, **arguments(options | {"dims"}, shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_a_low_temperature_does_not_overflow(call: Call, symmetric: bool, dtype: torch.dtype) -> None:
    query = unit_rows(5, 4, dtype)
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


@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_of_the_positive_are_kept_at_margin_0(call: Call, dtype: torch.dtype, symmetric: bool) -> None:
    query, candidate = (rows.to(dtype) for rows in doubled(300))
    for temperature in (0.05, 0.07):
        how: dict[str, Any] = {"temperature": temperature, "symmetric": symmetric, "reduction": "none"}
        losses = call(loss, query, candidate, margin=0.0, engine="triton", **how)
        assert float(losses.min()) > 0.69  # log 2: a negative that is the positive


def numerical(symmetric: bool, reduction: str) -> bool:
    """gradcheck in float64, which the interpreter multiplies exactly and no GPU kernel of ours takes."""
    torch.manual_seed(0)
    options = arguments(frozenset(OPTIONS) - {"hardness", "symmetric", "dims"}, (5, 8, 4))
    leaves = [unit_rows(5, 4, torch.float64), unit_rows(8, 4, torch.float64), torch.tensor(0.3, dtype=torch.float64)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def of_leaves(query: Tensor, candidate: Tensor, temperature: Tensor) -> Tensor:
        how: dict[str, Any] = {"symmetric": symmetric, "reduction": reduction, "engine": "triton"}
        return loss(query, candidate, temperature=temperature, **options, **how)

    return torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_gradcheck_in_the_interpreter(interpreted: Call, symmetric: bool, reduction: str) -> None:
    assert interpreted(numerical, symmetric, reduction)


def in_halves(margin: float | None, dtype: torch.dtype = torch.float64, share: float = 1.0) -> list[Tensor]:
    """Losses and gradients of a symmetric problem and of its two halves of queries, joined by ``merge``.

    The first half's coefficients are multiplied by ``share``.
    """
    from mmemb.kernels.triton import engine as triton

    torch.manual_seed(0)
    query, candidate, work = unit_rows(9, 5, dtype), unit_rows(11, 5, dtype), work_dtype(dtype)
    positive, coefficient = torch.randperm(11)[:9], torch.rand(9, dtype=work)
    coefficient[:4] *= share

    def solve_rows(rows: slice, merge: Merge | None) -> tuple[Tensor, ...]:
        scale = torch.tensor(20.0, dtype=work)
        problem = Problem(query[rows], candidate, scale, positive[rows], None, None, 21.0, margin)
        losses, found = triton.symmetric(problem, coefficient=coefficient[rows], merge=merge)
        assert found is not None
        return losses, found.query, found.candidate, found.temperature

    def join(*columns: Columns) -> Columns:
        others = torch.stack([each.others for each in columns]).logsumexp(0)
        own, share = (torch.stack([getattr(each, x) for each in columns]).sum(0) for x in ("own", "share"))
        return Columns(others, own, share)

    def solve_halves(known: list[list[Columns]]) -> tuple[list[list[Columns]], list[tuple[Tensor, ...]]]:
        """What each half asks to merge, and its results, given what the other half asked before."""
        asked: list[list[Columns]] = [[], []]

        def solve_half(half: int, rows: slice) -> tuple[Tensor, ...]:
            def merge(columns: Columns) -> Columns:
                asked[half].append(columns)
                theirs = known[1 - half][len(asked[half]) - 1 : len(asked[half])]
                return join(columns, *theirs)

            return solve_rows(rows, merge)

        return asked, [solve_half(0, slice(0, 4)), solve_half(1, slice(4, 9))]

    # With a margin the columns' limits are merged first, and the sums depend on them: a round for each, and one.
    known: list[list[Columns]] = [[], []]
    for _ in range(3):
        known, (first, second) = solve_halves(known)
    whole = solve_rows(slice(0, 9), None)
    joined = [torch.cat([first[i], second[i]]) for i in (0, 1)] + [first[i] + second[i] for i in (2, 3)]
    return [*whole, *joined]


@pytest.mark.parametrize("margin", [None, 0.1])
def test_columns_joined_over_halves_of_the_queries_equal_the_whole(interpreted: Call, margin: float | None) -> None:
    found = interpreted(in_halves, margin)
    for whole, joined in zip(found[:4], found[4:], strict=True):
        torch.testing.assert_close(joined, whole)


@pytest.mark.parametrize("share", [0.05, 0.0])
def test_a_half_whose_weights_are_small_does_not_overflow_float16(interpreted: Call, share: float) -> None:
    found = interpreted(in_halves, None, torch.float16, share)
    for whole, joined in zip(found[:4], found[4:], strict=True):
        assert float((joined - whole).norm()) <= 2e-3 * float(whole.norm())


def test_no_queries_have_no_gradient(interpreted: Call) -> None:
    assert interpreted(without_queries) == [0.0, 0.0]


def without_queries() -> list[float]:
    """Largest candidate gradient where a rank has no query, one-direction and symmetric."""
    from mmemb.kernels.triton import engine as triton

    none = torch.zeros(0, dtype=torch.int64)
    problem = Problem(torch.zeros(0, 8), torch.randn(5, 8), torch.tensor(20.0), none, None, None, 100.0)
    found = [solve(problem, coefficient=torch.zeros(0))[1] for solve in (triton.one_direction, triton.symmetric)]
    return [float(each.candidate.abs().amax()) for each in found if each is not None]


def peak_bytes(symmetric: bool, workspace_bytes: int) -> float:
    """Most bytes of torch's tensors while a problem of 256 x 512 with ids, a margin and weights is solved."""
    query, candidate = unit_rows(256, 8, torch.bfloat16), unit_rows(512, 8, torch.bfloat16)
    how: dict[str, Any] = {"temperature": 0.05, "engine": "triton", "workspace_bytes": workspace_bytes}
    how |= arguments({"ids", "margin", "weight"}, (256, 512, 8))

    def run() -> None:
        grads(query, candidate, symmetric=symmetric, **how)

    return 1e6 * harness.peak_megabytes(run, device="cpu")


@pytest.mark.parametrize("symmetric", [False, True], ids=["one", "both"])
def test_the_workspace_holds_sums_and_float32_copies_too(interpreted: Call, symmetric: bool) -> None:
    # Room for all rows in 2 bytes, and for one tile's with the copy in 4 and the sums of their pieces.
    workspace = 420_000
    of_embeddings = 512 * 8 * 4
    assert interpreted(peak_bytes, symmetric, workspace) < workspace + 6 * of_embeddings


def test_a_cpu_without_the_interpreter_is_refused() -> None:
    rows = unit_rows(3, 4, torch.float32)
    with pytest.raises(ValueError, match="engine 'triton' needs a CUDA device and query is on cpu"):
        loss(rows, rows, temperature=0.1, engine="triton")


@pytest.mark.gpu
def test_large_problems_on_a_gpu() -> None:
    # Full tiles, many slabs and the copy engine, against the tiled engine in float32.
    query, candidate = unit_rows(5003, 512, torch.bfloat16).cuda(), unit_rows(9001, 512, torch.bfloat16).cuda()
    for symmetric in (False, True):
        kwargs: dict[str, Any] = {"temperature": 0.02, "symmetric": symmetric}
        expected = grads(query.float(), candidate.float(), engine="tiled", **kwargs)
        given = grads(query, candidate, workspace_bytes=16 * 2**20, engine="triton", **kwargs)
        for name, a, b in zip(FIELDS, given, expected, strict=True):
            assert error(a, b.double()) < 1e-2, name


@pytest.mark.gpu
def test_memory_on_a_gpu_stays_within_the_workspace() -> None:
    query = unit_rows(16384, 64, torch.bfloat16).cuda()
    grads(query[:512], query[:512], temperature=0.02, engine="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    workspace = 64 * 2**20
    grads(query, query, temperature=0.02, symmetric=True, workspace_bytes=workspace, engine="triton")
    of_embeddings = 16 * query.numel() * query.element_size()
    assert torch.cuda.max_memory_allocated() - before < 1.5 * workspace + of_embeddings


def test_the_table_has_a_line_for_every_chip_and_16_and_32_bits() -> None:
    chips = {"sm_80", "sm_90", "sm_100", "amd", "interpreter"}
    assert set(_tiles.TILES) == {(chip, size) for chip in chips for size in (2, 4)} | {("interpreter", 8)}
    assert _tiles.choose(torch.device("cpu"), torch.float32) == _tiles.TILES["interpreter", 4]


def test_float64_is_not_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "chip", lambda device: "sm_90")
    assert _tiles.choose(torch.device("cuda"), torch.bfloat16) == _tiles.TILES["sm_90", 2]
    assert _tiles.choose(torch.device("cuda"), torch.float64) is None


@pytest.mark.parametrize(
    ("capability", "line"), [(7, "older"), (8, "sm_80"), (9, "sm_90"), (10, "sm_100"), (12, "sm_80")]
)
def test_chips_before_ampere_have_no_line(monkeypatch: pytest.MonkeyPatch, capability: int, line: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert _tiles.chip(torch.device("cuda")) == line
    assert (_tiles.choose(torch.device("cuda"), torch.bfloat16) is None) == (line == "older")


@pytest.fixture
def probe_again() -> Iterator[None]:
    """Forgets, before and after, what was found about this machine's GPU."""
    forget = importlib.import_module(engines.TRITON).no_launch.cache_clear, engines._warn_of_fallback.cache_clear
    for each in forget:
        each()
    yield
    for each in forget:
        each()


@pytest.mark.usefixtures("probe_again")
@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
            "Failed to find C compiler. Please specify via CC environment variable. "
            "(a C compiler and Python's headers are needed; CC names one)",
        ),
        (
            subprocess.CalledProcessError(1, "gcc"),
            "Command 'gcc' returned non-zero exit status 1. "
            "(a C compiler and Python's headers are needed; CC names one)",
        ),
        (AssertionError("libcuda.so cannot found!\nPossible files are ..."), "libcuda.so cannot found!"),
        (ImportError(), "ImportError"),
    ],
    ids=["no compiler", "no headers", "no library", "unnamed"],
)
def test_a_machine_that_cannot_launch_kernels_takes_the_other_engine(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, told: str
) -> None:
    class Driver:
        @property
        def active(self) -> object:
            raise failure

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton.runtime, "driver", Driver())
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert engines.choose(query) is importlib.import_module(engines.TILED)  # type: ignore[arg-type]
    assert [str(each.message) for each in caught] == [f"the loss takes the slower engine 'tiled': {told}"]
    with pytest.raises(ValueError, match=re.escape(f"engine 'triton' cannot launch kernels: {told}; leave engine")):
        engines.choose(query, engine="triton")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD's library has no mixed products")
def test_float16_sums_are_float32_whatever_the_library_may_do() -> None:
    assert multiplies_mixed(torch.device("cuda"), torch.float16)
    library = torch.backends.cuda.matmul
    library.allow_fp16_accumulation = True
    try:
        assert not multiplies_mixed(torch.device("cuda"), torch.float16)
        assert multiplies_mixed(torch.device("cuda"), torch.bfloat16)
    finally:
        library.allow_fp16_accumulation = False


def operands(width: int) -> list[tuple[int, int]]:
    """Width, and address modulo 16, of all that the kernels load embeddings from."""
    from mmemb.kernels.triton.launch import Launcher

    rows = torch.randn(5, width, dtype=torch.bfloat16)
    index = torch.arange(5)
    launcher = Launcher(
        Problem(rows, rows, torch.tensor(1.0), index, None, None, 100.0, None, Peers(rows, index, None), True), None
    )
    parts = [launcher.main, *launcher.parts.values()]
    return [(each.shape[1], each.data_ptr() % 16) for part in parts for each in (part.left, part.right)]


@pytest.mark.parametrize(("width", "loaded"), [(13, 16), (24, 32), (48, 48)])
def test_what_kernels_load_is_as_wide_as_they_were_compiled_for(interpreted: Call, width: int, loaded: int) -> None:
    assert interpreted(operands, width) == [(loaded, 0)] * 6
