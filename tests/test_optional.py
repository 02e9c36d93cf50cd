"""Packages that not everyone has."""

from pathlib import Path

import pytest

from ckptavg.errors import SpecError
from ckptavg.optional import import_optional


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No module named 'pack_a'. Install it with pip install pack-a."),
        ("import pack_b.parts", "No module named 'pack_b'. Install pack_b, which it needs."),
        ("import pack_a.parts", "No module named 'pack_a.parts'. Install it with pip install"),
        ("raise ImportError('too old')", "too old. Install it with pip install pack-a."),
    ],
    ids=["missing", "another is missing", "a part is missing", "it cannot"],
)
def test_import_optional_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, told: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    if content is not None:
        (tmp_path / "pack_a").mkdir()
        (tmp_path / "pack_a" / "__init__.py").write_text(content)
    with pytest.raises(SpecError) as caught:
        import_optional("pack_a", "pack-a")
    assert f"pack-a cannot be imported: {told}" in str(caught.value)
