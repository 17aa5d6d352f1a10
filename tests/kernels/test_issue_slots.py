"""Issue slots and exponentials are counted as by hand, and kernels above their budgets are found."""

import pytest

from awrsr_kernels import issue_slots
from awrsr_kernels.issue_slots import Level, columns, count, most_exponentials, nest, over_budget, tiles, trips
from awrsr_kernels.launch_config import RESIDENT, STEP, TILED, Config

CASE = {"target": "sm_90", "refinement": "simple", "dtype": "bfloat16", "dropout": False, "group": 1, "stochastic": False}


def assemble(lines: list[str]) -> str:
    """Lines as cuobjdump prints them, 16 bytes each."""
    return "".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x000000 */\n" for i, line in enumerate(lines))


# Before the loops 2 instructions, after them 1; the outer loop 4 of its own, the inner one 3; padding that is not counted 2
NEST = assemble(
    [
        "MOV R1, c[0x0][0x28]",
        "@P0 BRA 0xa0",  # forward, so not a loop
        "FADD R2, R3, R4",  # 0x20: the outer loop
        "@!P1 MUFU.EX2 R7, R7",
        "FFMA R5, R5, R6, R7",  # 0x40: the inner loop
        "MUFU.EX2 R8, R5",
        "@P0 BRA 0x40",
        "IADD3 R9, R9, 0x1, RZ",
        "@!P2 BRA `(.L_x_1) 0x20",
        "STG.E desc[UR4][R2.64], RZ",  # 0x90: zeros to padding
        "@P3 BRA 0x90",
        "EXIT",
        "BRA 0xc0",
        "NOP",
    ]
)


def test_a_nest_of_two_loops_by_hand() -> None:
    assert nest(NEST) == [Level(3, 0), Level(4, 1), Level(3, 1)]
    assert nest("") == []
    # Two blocks of 64 rows and three tiles: the inner loop of the resident forward runs once, below the diagonal
    config = Config(64, 64, 8, 1)
    assert trips("resident_fwd", config, 100, 3) == [1, 2, 1] and trips("resident_bwd", config, 100, 3) is None
    found = count(NEST, "resident_fwd", config, 100, "simple")
    assert found == (2 * (3 + 2 * 4 + 3), (2 + 1) * 32 * 8, 2 * 5050)
    assert count(NEST, "tiled_bwd_columns_stage1", config, 100, "simple") is None  # one loop too many


def test_tiles_that_need_no_mask_have_a_loop_of_their_own() -> None:
    """Three tiles of 64 x 64: one below the diagonal, two on it. Outside the loops two instructions, in them two and three."""
    code = assemble(["MOV R1, R2", "FADD R1, R1, R1", "BRA 0x10", "FADD R1, R1, R1", "MUFU.EX2 R1, R1", "BRA 0x30", "EXIT"])
    config = Config(64, 64, 4, 1)
    assert nest(code) == [Level(2, 0), Level(5, 1)] and nest(code, apart=True) == [Level(2, 0), Level(2, 0), Level(3, 1)]
    assert count(code, "tiled_bwd_rows_stage1", config, 100, "simple") == (2 * 2 + 1 * 2 + 2 * 3, 2 * 32 * 4, 5050)


def test_a_narrow_block_counts_where_a_length_leaves_one() -> None:
    """200 items are three blocks of 64 and 8 items in a block of 16; 100 are two blocks, whose code for narrow ones is skipped."""
    code = [
        "@P0 BRA 0x40",  # to the outer loop: no narrow block of rows
        "HMMA R1, R1, R1, R1",
        "MUFU.EX2 R1, R1",
        "MOV R1, R1",
        "FADD R1, R1, R1",  # 0x40: the outer loop
        "@P1 BRA 0x80",  # to the inner loop: no narrow block of columns
        "HMMA R1, R1, R1, R1",
        "MUFU.EX2 R1, R1",
        "FADD R1, R1, R1",  # 0x80: the inner loop
        "HMMA R1, R1, R1, R1",
        "@P2 BRA 0x80",
        "@P3 BRA 0x40",
        "EXIT",
    ]
    narrow, square = Config(64, 16, 4, 1), Config(64, 64, 4, 1)
    assert [trips("resident_fwd", narrow, n, 3) for n in (200, 100, 128, 9)] == [[1, 3, 3], [1, 2, 1], [1, 2, 1], [1, 0, 0]]
    counts = {n: count(assemble(code), "resident_fwd", narrow, n, "simple") for n in (200, 100)}
    assert counts[200] == (5 + 3 * 5 + 3 * 3, (1 + 3) * 32 * 4, 2 * 20100) and counts[100] == (2 + 2 * 3 + 3, 0, 2 * 5050)
    assert count(assemble(code), "tiled_bwd_tables", square, 100, "simple").slots == 2 * 5 + 3 * 3  # such branches are its own
    computed = 6 * 64 * 64 + 3 * 64 * 16 + 16 * 16
    assert most_exponentials("resident_bwd", narrow, 200) == pytest.approx(1.25 * computed / 20100)
    assert most_exponentials("resident_bwd", square, 200) == pytest.approx(1.25 * 10 * 64 * 64 / 20100)


def test_trips_follow_from_regime_tile_and_length() -> None:
    assert trips("short_fwd", Config(64, 64, 4, 1), 64, 2) == [0, 1]
    assert trips("short_fwd", Config(64, 64, 4, 1), 20, 2) == [0, 1 / 3]
    assert trips("short_bwd", Config(16, 16, 1, 1), 1, 2) == [0, 1 / 4]
    assert trips("resident_bwd", Config(64, 64, 4, 1), 200, 4) == [0, 1, 4, 6]
    assert trips("tiled_bwd_tables", Config(64, 64, 4, 1), 200, 3) == [0, 4, 10]
    assert trips("tiled_fwd", Config(32, 16, 8, 1), 70, 2) == [3, 2 + 4 + 5]
    assert tiles("tiled_bwd_columns", Config(32, 16, 8, 1), 70) == (5, 3 + 3 + 2 + 2 + 1)


def tiled(exponentials: int) -> str:
    return assemble(["NOP", "FADD R1, R1, R1", *["MUFU.EX2 R1, R1"] * exponentials, "BRA 0x10", "EXIT"])


@pytest.mark.parametrize("kernel,stages", [("short_fwd", 2), ("tiled_fwd_stage1", 1), ("tiled_fwd_stage2", 1)])
def test_warps_that_repeat_exponentials_are_over_budget(kernel: str, stages: int) -> None:
    """A tile of 64 x 64 over 4 warps: 32 exponentials per thread and stage, and 2 for rescaling."""
    length = TILED if kernel.startswith("tiled") else 64
    for config, per_thread, over in (((64, 64, 4, 1), 34, False), ((64, 64, 8, 1), 34, True), ((64, 64, 4, 1), 64, True)):
        sass = tiled(per_thread * stages)
        row = columns(sass, kernel, Config(*config), length=length, width=32, **CASE) | {"issue_slots_budget": None}
        assert (over_budget(row) != []) == over, (row, config)
    assert row["exponentials_budget"] == most_exponentials(kernel, Config(64, 64, 4, 1), length or 512)


def test_rows_have_the_columns_of_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(64, 64, 4, 1)
    both = {"issue_slots", "issue_slots_budget", "exponentials", "exponentials_budget"}
    assert set(columns(tiled(1), "tiled_fwd", config, length=TILED, width=32, **CASE)) == both
    resident = columns(NEST, "resident_fwd", config, length=RESIDENT, width=32, **CASE)
    assert set(resident) == both | {"issue_slots_100", "issue_slots_100_budget"}
    assert resident["issue_slots"] == 3 + 4 * 4 + 6 * 3 and resident["issue_slots_100"] == 3 + 2 * 4 + 3
    assert columns("", "decode_step", config, length=STEP, width=32, **CASE) == {}
    for other in ({"group": 2}, {"target": "sm_100"}):
        assert columns(NEST, "resident_fwd", config, length=RESIDENT, width=32, **CASE | other) == {}
    monkeypatch.setitem(issue_slots.SLOTS, ("resident_fwd", RESIDENT, 100), (13, 14))
    for width, dropout, above in ((32, False, ["issue_slots_100 13"]), (64, False, []), (32, True, [])):
        row = columns(NEST, "resident_fwd", config, length=RESIDENT, width=width, **CASE | {"dropout": dropout})
        assert over_budget(row) == above
    unknown = columns(NEST, "resident_bwd", config, length=RESIDENT, width=32, **CASE)
    assert unknown["issue_slots"] is None
    assert [text.split()[0] for text in over_budget(unknown)] == ["issue_slots", "issue_slots_100", "exponentials"]


def test_the_resident_regime_keeps_what_was_promised() -> None:
    """At width 32 at most 8,500 slots forward and backward with 100 items, 22,000 with 200."""
    for length, most in ((100, 8500), (200, 22000)):
        assert sum(issue_slots.SLOTS[f"resident_{x}", RESIDENT, length][0] for x in ("fwd", "bwd")) <= most
