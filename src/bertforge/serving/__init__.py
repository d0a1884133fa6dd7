"""`bertforge serve`: fronts that speak HTTP, and one engine process that computes for all of them."""

from importlib.util import find_spec


def installed() -> bool:
    """Whether the libraries of the extra `serve` are there."""
    return all(find_spec(name) for name in ("fastapi", "uvicorn", "httptools", "prometheus_client"))
