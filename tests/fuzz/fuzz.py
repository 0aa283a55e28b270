"""Fuzzes a reader of files, guided by coverage: `python tests/fuzz/fuzz.py TARGET [options of libFuzzer]`.

It needs atheris: `pip install atheris`. With `-runs=1000000` it ends after a million executions, without it goes on
until it finds something. Copy what it finds to tests/fuzz/findings/TARGET/, where test_findings.py reads it.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))
with atheris.instrument_imports(include=["apcnet", "pickletools", "zipfile", "json"]):
    import targets


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in targets.TARGETS:
        sys.exit(f"target: expected one of {', '.join(targets.TARGETS)}")
    warnings.simplefilter("ignore")
    name = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp(prefix=f"apcnet-fuzz-{name}-"))
    for number, seed in enumerate(targets.seeds(name)):
        (corpus / f"seed{number}").write_bytes(seed)
    limits = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:], str(corpus)], targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
