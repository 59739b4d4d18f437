"""What a model does on a device of its own, in processes of their own: tests/on_a_device.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot make a device of Python alone",
)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_a_model_does_on_a_device_what_it_does_on_the_cpu(family: str) -> None:
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", family, str(ROOT / "tests/on_a_device.py")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout
