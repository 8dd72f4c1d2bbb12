"""docs/backends.md is what the declared capabilities say."""

from pathlib import Path

from attention_dispatch.support_table import support_table


def test_the_documented_table_is_up_to_date():
    documented = Path(__file__).parent.parent / "docs" / "backends.md"
    assert documented.read_text(encoding="utf-8") == support_table(), "run `make docs`"
