"""Compiles configurations for TPU pods, keeps the reports in docs/scale/ and writes them into docs/scale.md.

python benchmarks/scale.py [NAME ...]; without names only the table is written anew. One compilation takes minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "docs" / "scale"
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- figures: benchmarks/scale.py -->", "<!-- end of figures -->"

# Exchanges on the sparse cores of v5p and v6e, beside the matrix units.
BESIDE = (
    "xla_tpu_enable_sparse_core_collective_offload_all_gather=true,"
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true,xla_tpu_enable_all_gather_offload_tracing=true,"
)
# Of the memory of a core, what one operation may take: products get larger tiles, and prefetched operands less room.
TILES = "xla_tpu_scoped_vmem_limit_kib="
V5E, V5P, V6E = f"--options={TILES}65536", f"--options={BESIDE}{TILES}49152", f"--options={BESIDE}{TILES}98304"
CASES = {
    "t5_xxl_v5e": ("scale/t5_xxl.gin", V5E),
    "palm_8b_v5p": ("scale/palm_8b.gin", V5P),
    "palm_8b_v6e": ("scale/palm_8b.gin", "--topology=v6e:16x16", "--gin.BATCH_SIZE=1024", "--gin.REMAT=full", V6E),
    "palm_62b_v5p": ("scale/palm_62b.gin", V5P),
    "palm_540b_v5p": ("scale/palm_540b.gin", V5P),
    "palm_8b_1m_v5p": ("scale/palm_8b_1m.gin", V5P),
    "moe_t5_v5p": ("scale/moe_t5.gin", V5P),
    "ec_xl_v5p": ("scale/ec_xl.gin", V5P),
    "st_moe_32b_v5p": ("scale/st_moe_32b.gin", V5P),
    "clp_t5_xxl_v5p": ("scale/clp_t5_xxl.gin", V5P),
    "clp_palm_8b_v5p": ("scale/clp_palm_8b.gin", V5P),
}


def compile_case(name: str) -> None:
    """One report."""
    file, *flags = CASES[name]
    command = [sys.executable, "-m", "clp_jax.main", "compile", f"--gin_file={file}", *flags]
    subprocess.run([*command, f"--output={REPORTS / name}.json"], check=True, cwd=ROOT)


def table() -> str:
    """All reports, a row for each program."""
    lines = [
        "| configuration | chips | mesh | parameters | program | HBM of a chip | time | exposed | MFU | tokens/s/chip |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        path = REPORTS / f"{name}.json"
        if not path.is_file():
            continue
        report = json.loads(path.read_text())
        where = f"{report['topology']}, {report['chips']}"
        mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
        for program in report["programs"]:
            memory = program["memory"]
            held = f"{memory['needed'] / 2**30:.1f} of {memory['limit'] / 2**30:.0f} GiB"
            figures = (
                f"{program['seconds'] * 1e3:,.0f} ms",
                f"{program['exposed_seconds'] * 1e3:,.0f} ms",
                f"{100 * program['mfu']:.1f} %",
                f"{program['tokens_per_second_per_chip']:,.0f}",
            )
            shown = figures if program["seconds"] else ("does not fit", "", "", "")
            row = (name, where, mesh, f"{report['parameters'] / 1e9:.1f} billion", program["name"], held, *shown)
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    """Compiles what is named and writes the page."""
    for name in sys.argv[1:]:
        if name not in CASES:
            sys.exit(f"there is no case {name!r}: {', '.join(CASES)}.")
        compile_case(name)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
