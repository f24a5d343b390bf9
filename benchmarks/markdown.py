"""Print the rows that benchmarks wrote with --json as Markdown tables, for docs/performance.md.

python benchmarks/markdown.py docs/performance/*.json
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

GENERATE: dict[str, Callable[[Row], str]] = {
    "variant": lambda row: row["variant"],
    "weights, GB": lambda row: f"{row['weight_bytes'] / 1e9:.2f}",
    "of the first": lambda row: f"{row['weight_ratio']:.2f}",
    "with all layers": lambda row: f"{row['weight_bytes_all_layers'] / 1e9:.2f} ({row['weight_ratio_all_layers']:.3f})",
    "load, s": lambda row: f"{row['load_s']:.1f}",
    "load peak, GB": lambda row: f"{row['load_peak_bytes'] / 1e9:.2f}",
    "peak, GB": lambda row: f"{row['peak_memory_bytes'] / 1e9:.2f}",
    "prefill, ms": lambda row: f"{row['prefill_ms']:.0f} ± {100 * row['prefill_spread']:.0f} %",
    "ms per token": lambda row: f"{row['decode_ms_per_token']:.1f} ± {100 * row['decode_spread']:.0f} %",
}
SEARCH: dict[str, Callable[[Row], str]] = {
    "search": lambda row: row["search"],
    "seconds per layer": lambda row: f"{row['seconds_per_layer']:.1f}",
    "× layer-wise": lambda row: f"{row['times_as_long_as_layer_wise']:.2f}",
}


def table(rows: list[Row]) -> str:
    """A file's rows as a Markdown table, below a line with the machine."""
    if "out_features" in rows[0]:
        return f"{rows[0]['machine']}\n\n{_by_size(rows)}"
    if "prefill_ms" in rows[0]:
        columns = GENERATE | {f"{length} out, s": _answer(length) for length in _lengths(rows[0])}
    else:
        columns = SEARCH
    lines = [rows[0]["machine"], "", f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    return "\n".join(lines)


def _by_size(rows: list[Row]) -> str:
    """Products: a row for each variant, and a cell for each Linear and number of tokens."""
    variants = {row["variant"]: {} for row in rows}
    for row in rows:
        variants[row["variant"]][f"{row['out_features']} × {row['in_features']}, {row['tokens']}"] = row
    sizes = [*dict.fromkeys(size for found in variants.values() for size in found)]
    lines = [f"| variant | {' | '.join(sizes)} | error |", f"|---|{'---:|' * (len(sizes) + 1)}"]
    for variant, found in variants.items():
        cells = (_product(found[size]) if size in found else "" for size in sizes)
        error = max(row["relative_error"] for row in found.values())
        lines.append(f"| {variant} | {' | '.join(cells)} | {error:.1e} |")
    return "\n".join(lines)


def _product(row: Row) -> str:
    ratio = "" if row["variant"] == "bf16" else f" (× {row['times_as_fast_as_bf16']:.2f})"
    return f"{row['ms']:.3g}{ratio}"


def _lengths(row: Row) -> list[str]:
    """The lengths of the answers in tokens."""
    return [key.split("_")[1] for key in row if key.startswith("seconds_") and key.endswith("_out")]


def _answer(length: str) -> Callable[[Row], str]:
    return lambda row: f"{row[f'seconds_{length}_out']:.2f} (× {row[f'times_as_fast_{length}_out']:.2f})"


def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of benchmarks")
    for file in parser.parse_args().files:
        print(f"{table(json.loads(file.read_text()))}\n")


if __name__ == "__main__":
    main()
