"""The paper's numbers for ParaDLC-Bench and DLC-Bench, tables 2, 8 and 9: percent, tokens per pass, seconds."""

from typing import Any

COLUMNS = ("pos", "neg", "avg", "tokens_per_forward", "seconds")
OURS = "PerceptionDLM"

Rows = dict[str, tuple[float, ...]]  # values of [`COLUMNS`]; the last ones may be missing in the paper

# judge gpt-5.2
TABLE_2: Rows = {
    "GPT-5.2": (38.0, 71.0, 55.2),
    "Gemini-2.5-Pro": (39.7, 73.3, 57.5),
    "Gemini-3.1-Pro": (43.6, 81.1, 63.7),
    "PixelRefer 7B": (40.8, 78.7, 60.5, 1, 718),
    "DAM 3B": (48.1, 87.2, 69.2, 1, 326),
    "GAR 8B": (49.0, 87.6, 69.5, 1, 479),
    "LLaDA-V 8B": (24.1, 46.3, 35.2, 1, 3241),
    "SDAR-VL 8B": (30.2, 28.8, 31.3, 1, 945),
    "Dream-VL 7B": (29.7, 28.6, 30.4, 1, 446),
    OURS: (42.3, 82.4, 62.4, 2.9, 276),
}
TABLE_2_DLC: Rows = {
    "GPT-5.2": (18.0, 60.8, 39.4),
    "Gemini-2.5-Pro": (29.8, 66.0, 47.9),
    "Gemini-3.1-Pro": (26.2, 65.8, 46.0),
    "PixelRefer 7B": (49.6, 87.0, 68.3),
    "DAM 3B": (52.3, 82.2, 67.3),
    "GAR 8B": (50.9, 84.6, 67.8),
    "LLaDA-V 8B": (10.0, 39.2, 24.6),
    "SDAR-VL 8B": (9.9, 47.6, 28.8),
    "Dream-VL 7B": (9.8, 39.6, 24.7),
    OURS: (33.4, 72.8, 53.1),
}
TABLE_8: dict[str, Rows] = {
    "gemini-3.1-pro": {
        "GPT-5.2": (42.6, 72.6, 57.6),
        "Gemini-2.5-Pro": (41.1, 73.6, 57.3),
        "Gemini-3.1-Pro": (45.3, 82.7, 64.0),
        "PixelRefer 7B": (46.9, 87.7, 67.3),
        "DAM 3B": (52.3, 88.0, 70.1),
        "GAR 8B": (53.5, 88.8, 71.2),
        "LLaDA-V 8B": (31.0, 53.0, 42.0),
        "SDAR-VL 8B": (37.8, 32.7, 35.3),
        "Dream-VL 7B": (35.4, 35.8, 35.6),
        OURS: (47.1, 84.9, 66.0),
    },
    "qwen3.5-27b": {
        "GPT-5.2": (50.7, 72.8, 61.8),
        "Gemini-2.5-Pro": (45.5, 73.4, 59.4),
        "Gemini-3.1-Pro": (53.0, 82.8, 67.9),
        "PixelRefer 7B": (57.3, 88.8, 73.1),
        "DAM 3B": (59.6, 88.8, 74.2),
        "GAR 8B": (59.7, 89.7, 74.7),
        "LLaDA-V 8B": (38.9, 51.0, 45.0),
        "SDAR-VL 8B": (44.4, 38.1, 41.3),
        "Dream-VL 7B": (41.4, 37.9, 39.7),
        OURS: (59.4, 87.5, 73.5),
    },
}
# judge qwen3.5-27b, 32 token positions per caption; steps -> Pos, Neg, Avg, seconds
TABLE_9 = {
    16: (54.5, 83.4, 69.0, 138),
    32: (59.4, 87.5, 73.5, 276),
    48: (57.3, 83.7, 70.5, 411),
    64: (51.2, 83.8, 67.5, 549),
}


def paper_rows(benchmark: str, judge: str, steps: int | None = None) -> tuple[str, list[dict[str, Any]]]:
    """The rows of the paper to compare a run with.

    Args:
        benchmark (`str`): "paradlc" or "dlc".
        judge (`str`): the name of a preset; for any other judge the rows come from table 2, and the title says so.
        steps (`int`, *optional*): denoising steps of the run, for table 9.

    Returns:
        the title of the table, and its rows with `name` and [`COLUMNS`], None for values the paper does not have.
    """
    if benchmark == "dlc":
        rows, title = TABLE_2_DLC, "paper, table 2 (DLC-Bench)"
        theirs = "llama-3.1-8b"
    elif judge in TABLE_8:
        rows, title = TABLE_8[judge], f"paper, table 8 (judge {judge})"
        theirs = judge
    else:
        rows, title, theirs = TABLE_2, "paper, table 2", "gpt-5.2"
    if judge != theirs:
        title += f", judged by {theirs}: not comparable with scores of {judge}"
    found = [_row(name, values) for name, values in rows.items()]
    if benchmark == "paradlc" and judge == "qwen3.5-27b" and steps in TABLE_9:
        pos, neg, avg, seconds = TABLE_9[steps]
        found.append(_row(f"{OURS}, {steps} steps (table 9)", (pos, neg, avg, None, seconds)))
    return title, found


def _row(name: str, values: tuple) -> dict[str, Any]:
    return {"name": name, **dict.fromkeys(COLUMNS), **dict(zip(COLUMNS, values, strict=False))}
