"""Kill a training run a few times, start it again each time, and compare the weights with those of a run left alone.

python examples/killed_and_resumed.py
"""

import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytorch_accelerated.checkpoint import list_checkpoints

SCRIPT = Path(__file__).parent / "gpt.py"
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]


def start(save_dir: Path) -> subprocess.Popen[str]:
    """Start the training script, always with the same command."""
    arguments = ["--num-updates", "16", "--num-files", "2", "--save-every", "2", "--save-dir", str(save_dir)]
    return subprocess.Popen([sys.executable, "-u", str(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True)


def stop(process: subprocess.Popen[str], signal_number: signal.Signals, save_dir: Path) -> None:
    """Send a signal at a random moment after a new checkpoint has appeared, unless the process ends before."""
    before = list_checkpoints(save_dir)
    while process.poll() is None and list_checkpoints(save_dir) == before:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.8))
    process.send_signal(signal_number)


def finish(process: subprocess.Popen[str]) -> str | None:
    """Show what the process has printed of its state, wait for its end, and return the hash that it reached."""
    out, _ = process.communicate()
    for line in out.splitlines():
        if re.match("No checkpoint|Resuming|SIG|Passed over|hash", line):
            print(f"    {line}")
    print(f"    exit code {process.returncode}")
    found = re.search(r"hash of the weights: (\w+)", out)
    return found[1] if found else None


def main() -> None:
    """Run with kills, run without, and compare."""
    with tempfile.TemporaryDirectory() as name:
        save_dir = Path(name) / "killed"
        for signal_number in SIGNALS:
            print(f"A run that {signal_number.name} ends:")
            process = start(save_dir)
            stop(process, signal_number, save_dir)
            finish(process)
        print("The last one, left alone:")
        resumed = finish(start(save_dir))
        print("Another run, never interrupted:")
        uninterrupted = finish(start(Path(name) / "uninterrupted"))
    print("The weights are the same, bit by bit." if resumed == uninterrupted else "The weights DIFFER.")
    sys.exit(resumed is None or resumed != uninterrupted)


if __name__ == "__main__":
    main()
