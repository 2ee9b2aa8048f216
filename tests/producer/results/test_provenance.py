"""Provenance as it is shown: rows that were stored under an engine's old name read as new ones."""

from __future__ import annotations

from typing import Any

import pytest

from models.database import Database
from models.store import results
from producer.results.export import load_provenance

FACTS: dict[str, Any] = {
    **dict.fromkeys(("checkpoint_key", "tokenizer_hash", "dtype", "device"), "x"),
    "versions": {"torch": "2"},
}


@pytest.mark.parametrize(
    ("old", "new"), [("kernels", "cpu"), ("generate", "transformers"), ("cuda", "cuda")]
)
def test_an_old_row_equals_a_new_one(old: str, new: str, database: Database) -> None:
    with database.write() as connection:
        results.store_provenance(connection, {"id": "o" * 32, "engine": old, **FACTS})
        results.store_provenance(connection, {"id": "n" * 32, "engine": new, **FACTS})
    with database.read() as connection:
        found = load_provenance(connection, {"o" * 32, "n" * 32})
    assert found["o" * 32] == found["n" * 32]
    assert found["o" * 32]["engine"] == new
    assert list(found["o" * 32]) == list(found["n" * 32])
