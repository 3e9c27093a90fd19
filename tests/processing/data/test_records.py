"""JSON Lines files: malformed lines raise, or are skipped where a killed process may have left them."""

import pytest

from jnana.processing.data import read_json_lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lines.jsonl"


def test_records_are_read_one_by_one(path):
    path.write_bytes('\ufeff{"a": 1}\r\n\n  \n[2]\n"drei\u2028\u00e9"'.encode())
    assert list(read_json_lines(path)) == [{"a": 1}, [2], "drei\u2028\u00e9"]
    path.write_text('{"a": 1}\n{"a": \n')
    lines = read_json_lines(path)
    assert next(lines) == {"a": 1}  # before the malformed line is read
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 2, column 7: not valid JSON"):
        next(lines)


def test_missing_files(path):
    for torn in ("raise", "skip_last"):
        with pytest.raises(FileNotFoundError, match="lines.jsonl does not exist"):
            list(read_json_lines(path, torn=torn))
    assert list(read_json_lines(path, torn="skip")) == []


@pytest.mark.parametrize("torn_line", [b'{"a": 2', b'{"a": "\xc3', b"\x00\x00"])
def test_lines_that_a_killed_process_left(path, torn_line):
    path.write_bytes(b'{"a": 1}\n' + torn_line)  # killed
    for torn in ("skip", "skip_last"):
        assert list(read_json_lines(path, torn=torn)) == [{"a": 1}]
    with pytest.raises(ValueError, match="not valid JSON|not UTF-8"):
        list(read_json_lines(path))
    path.write_bytes(b'{"a": 1}\n' + torn_line + b'\n{"a": 3}\n')  # another process appended behind the line
    assert list(read_json_lines(path, torn="skip")) == [{"a": 1}, {"a": 3}]
    for torn in ("raise", "skip_last"):
        with pytest.raises(ValueError, match="not valid JSON|not UTF-8"):
            list(read_json_lines(path, torn=torn))


def test_a_complete_last_line_without_a_line_break_is_read(path):
    path.write_text('{"a": 1}\n{"a": 2}')
    for torn in ("raise", "skip", "skip_last"):
        assert list(read_json_lines(path, torn=torn)) == [{"a": 1}, {"a": 2}]
