import pytest

from bertforge.errors import UsageError
from bertforge.serving.keys import Keys

KEY, OTHER = "a" * 16, "b" * 40


@pytest.fixture
def written(tmp_path):
    def write(content):
        (tmp_path / "keys").write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "keys"

    return write


def test_a_key_names_its_client(written):
    keys = Keys.read(written(f"# clients\n\nweb {KEY}\nbatch.job-1\t {OTHER} \n"))
    assert keys.client(f"Bearer {KEY}") == "web"
    assert keys.client(f"bearer {OTHER}") == "batch.job-1"
    for wrong in ("", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer ", "Bearer \udce9"):
        assert keys.client(wrong) is None
    assert KEY not in repr(keys)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no key"),
        ("# nobody\n", "holds no key"),
        (f"web {KEY}\n{KEY}", "line 2 of --api-keys"),
        (f"we b {KEY}", "line 1 of --api-keys"),
        ("web short", "has a key of 5 characters"),
        (f"web {KEY}\nweb {OTHER}", "line 2 .* the name or the key of an earlier line"),
        (f"web {KEY}\nbatch {KEY}", "line 2 .* the name or the key of an earlier line"),
        (b"web \xff\xff\xff\xff", "not UTF-8"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_line_and_no_key_is_shown(written, content, said):
    with pytest.raises(UsageError, match=said) as raised:
        Keys.read(written(content))
    assert KEY not in str(raised.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(UsageError, match="nowhere cannot be read"):
        Keys.read(tmp_path / "nowhere")
