"""Parts hold each row of their tables once, and know the number it has there."""

from hypothesis import given
from hypothesis import strategies as st

from headstart.parts import PART_ROWS, Table, numbers_of, parts_of, slice_of


@given(rows=st.lists(st.tuples(st.integers(0, 3 * PART_ROWS), st.sampled_from(["x", "y"])), max_size=12))
def test_parts_hold_each_row_once_in_order_and_no_mixed_columns(rows: list[tuple[int, str]]) -> None:
    tables = [Table(f"{i}.csv", "", "", count, "text", shape) for i, (count, shape) in enumerate(rows)]
    parts = parts_of(tables)
    assert all(0 < part.rows <= PART_ROWS for part in parts)
    assert all(len({one.table.shape for one in part.slices}) == 1 for part in parts)
    found = [(int(one.table.source[:-4]), one.start, one.rows) for part in parts for one in part.slices]
    for i, (count, _) in enumerate(rows):
        begin = 0
        for start, some in [(start, some) for table, start, some in found if table == i]:
            assert start == begin
            begin += some
        assert begin == count
    assert [one[0] for one in found] == sorted(one[0] for one in found)
    names = [part.name for part in parts]
    assert names == sorted(set(names))


@given(
    kept=st.lists(st.booleans(), min_size=1, max_size=60),
    rows=st.integers(1, 7),
    ending=st.sampled_from(["csv", "jsonl"]),
)
def test_rows_keep_the_numbers_that_they_have_in_a_damaged_table(kept: list[bool], rows: int, ending: str) -> None:
    first = 2 if ending == "csv" else 1
    numbers = [number for number, here in enumerate(kept, start=first) if here]
    gaps = [number for number, here in enumerate(kept, start=first) if not here]
    table = Table(f"a.{ending}", "", "", len(numbers), "text", gaps=gaps)
    found = list[int]()
    for start in range(0, len(numbers), rows):
        piece = slice_of(table, start, min(rows, len(numbers) - start))
        assert all(piece.first < gap <= piece.first + piece.rows + len(piece.table.gaps) for gap in piece.table.gaps)
        found += numbers_of(piece)
    assert found == numbers
