"""Keep a run as evidence: its config.yaml, curve and the main columns of metrics.csv, in results/<script>_<task>_s<SEED>/.

python benchmarks/keep.py runs/pqn_minatar_Breakout-MinAtar_s0/<time> <commit that it ran at>
python plot.py results --out results        # all that was kept: the figure and the table of the README
"""

import shutil
import sys
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
MAIN = ["seed", "env_step", "update_steps", "time", "td_loss", "reset_steps"]
MAIN += ["test/percent_of_maximum", "test/human_normalized_score", "test/unfinished"]


def main(folder, commit):
    folder, saved = Path(folder), OmegaConf.load(Path(folder) / "config.yaml")
    saved.update(saved.pop("about", {}))
    command, *resumed = saved.pop("commands", [saved.get("command"), *saved.pop("resumed", [])])
    (script,) = (path.stem for path in folder.glob("pqn_*.py"))
    sys.path.insert(0, str(ROOT))
    config = __import__(script).Config(**OmegaConf.to_container(saved.alg))
    kept = ROOT / "results" / f"{script}_{config.TASK}_s{saved.SEED}"
    kept.mkdir(parents=True, exist_ok=True)
    words = command[command.index(script) :].split()
    command = " ".join(["python", *(word for word in words if not word.startswith("SAVE_PATH="))])
    about = {"script": script, "task": config.TASK, "commit": commit, "command": command}
    about |= {"SAVE_PATH": "runs", "RESUME": None, "resumed": len(resumed)}  # no paths of a machine
    OmegaConf.save(OmegaConf.to_container(saved) | about, kept / "config.yaml")
    table = pd.read_csv(folder / "metrics.csv")
    columns = [name for name in table if name in MAIN or "returned_" in name or "test/Achievements" in name]
    table[columns].to_csv(kept / "metrics.csv", index=False, float_format="%.6g")
    shutil.copy(folder / "learning_curve.png", kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
