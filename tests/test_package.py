"""What `import bertforge` offers."""

import subprocess
import sys

import bertforge


def test_the_public_names_are_listed_before_any_is_used():
    listed = "import bertforge, sys; print(*dir(bertforge)); print('torch' in sys.modules)"
    names, torch_loaded = subprocess.run(
        [sys.executable, "-c", listed], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {*bertforge.__all__, "__version__"} <= set(names.split())
    assert torch_loaded == "False"


def test_every_public_name_is_there():
    for name in bertforge.__all__:
        assert getattr(bertforge, name).__name__ == name
