"""What must start fast stays light: no torch, no Lightning, no transformers until a command needs them."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "transformers", "numpy", "pyarrow", "PIL", "matplotlib")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("code", "seconds"),
    [
        ("import mmemb", 0.3),
        ("import mmemb.registry, mmemb.types", 0.5),
        ("from mmemb.__main__ import main; assert main(['--help']) == 0", 2.0),
        ("from mmemb.__main__ import main; assert main(['--version']) == 0", 1.0),
        ("from mmemb.__main__ import main; assert main(['components']) == 0", 1.0),
        ("from mmemb.__main__ import main; assert main(['components', '--json']) == 0", 1.0),
        ("from mmemb.__main__ import main; assert main(['fitt']) == 2", 1.0),
    ],
)
def test_light_and_fast(code: str, seconds: float) -> None:
    check = f"{code}\nimport sys; heavy = [name for name in {HEAVY!r} if name in sys.modules]; assert not heavy, heavy"
    before = cpu_seconds()
    done = run(check)
    assert done.returncode == 0, done.stderr
    assert cpu_seconds() - before < seconds


def cpu_seconds() -> float:
    """Processor time of all finished children: unlike the clock, it does not know what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_types_and_registry_do_not_know_torch_at_run_time() -> None:
    done = run("import mmemb.types as t; t.Item('', (t.Text('a'),)); import sys; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
