import json, os
from randlora.records.result import Result
def state(folder):
    if (folder / "result.json").is_file():
        return Result.read(folder / "result.json").status
    pid = json.loads((folder/"status.json").read_text())["pid"]
    return "running" if os.path.exists(f"/proc/{pid}") else "dead"
