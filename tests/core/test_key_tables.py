"""Tables of keys hold each key once, in the order of the keys, whatever bytes the digests have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedonce._engine.key_tables import NO_KEYS, make_key_table, read_key_tables

SCOPE = "0123456789abcdef"
# Zero bytes at the end would be lost if a digest became a bytes object of numpy.
DIGESTS = st.sampled_from(["00", "0a", "20", "7f", "80", "ff"]).flatmap(
    lambda first: st.sampled_from([first + "00" * 31, first * 32, "00" * 31 + first, first + "ff" * 30 + "00"])
)
DIGEST_LISTS = st.lists(DIGESTS, max_size=12)


def make_keys(digests: list[str] | set[str]) -> list[str]:
    return sorted({f"eo1.{SCOPE}.{digest}" for digest in digests})


@given(DIGEST_LISTS, DIGEST_LISTS)
def test_tables_are_sorted_sets_of_keys(one: list[str], other: list[str]) -> None:
    table, second = make_key_table(one), make_key_table(other)
    assert len(table) == len(set(one))
    assert table.list_keys(SCOPE, 0, len(table)) == make_keys(one)
    assert table.list_keys(SCOPE, 1, 3) == make_keys(one)[1:3]
    assert table.unite(second).list_keys(SCOPE, 0, 99) == make_keys({*one, *other})
    assert table.intersect(second).list_keys(SCOPE, 0, 99) == make_keys(set(one) & set(other))
    assert table.subtract(second).list_keys(SCOPE, 0, 99) == make_keys(set(one) - set(other))
    assert table.contains(make_keys(other)).tolist() == [key[-64:] in one for key in make_keys(other)]


@given(st.lists(st.tuples(st.sampled_from(["0" * 16, "f" * 16]), DIGESTS), max_size=20))
def test_listed_keys_are_grouped_by_scope(pairs: list[tuple[str, str]]) -> None:
    keys = [f"eo1.{scope}.{digest}" for scope, digest in pairs]
    tables = read_key_tables(iter(keys))
    assert {scope: table.list_keys(scope, 0, 99) for scope, table in tables.items()} == {
        scope: sorted({key for key in keys if key[4:20] == scope}) for scope in {scope for scope, _ in pairs}
    }


def test_keys_of_other_records_are_not_entries() -> None:
    digest = "a" * 64
    others = [
        f"eo1.card.{SCOPE}",
        f"eo1.lease.{SCOPE}.{digest}",
        f"eo1.savings.20261201.{SCOPE}.1",
        f"eo1.import.{SCOPE}.{digest}",
        f"eo2.{SCOPE}.{digest}",
        f"eo1.{SCOPE.upper()}.{digest}",
        f"eo1.{SCOPE}.{digest}0",
        "eo1.probe",
        "\ud800",
    ]
    assert read_key_tables(others) == {}
    assert len(NO_KEYS) == 0
    assert NO_KEYS.list_keys(SCOPE, 0, 9) == []
