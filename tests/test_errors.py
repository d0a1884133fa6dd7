"""What counts as a lack of memory, whoever reports it."""

import pytest
import torch

from bertforge.errors import is_out_of_memory


def test_an_error_while_memory_is_handled_is_a_lack_of_memory():
    """As when the end of a graph's recording fails because memory ran out within it."""
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            raise RuntimeError("capture failed")  # noqa: B904  # as __exit__ does
    except RuntimeError as error:
        following = error
    assert is_out_of_memory(following)
    assert not is_out_of_memory(RuntimeError("capture failed"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=str,
)
def test_every_library_says_it_in_its_own_way(error):
    assert is_out_of_memory(error)
