"""Is a worker for tests, `python -m tests.benchmarks.dying`, which ends in the ways that its requests name."""

from __future__ import annotations

import os
import signal
import sys
import time

from benchmarks.workers import Requests


def main() -> None:
    requests = Requests()
    while (request := requests.next()) is not None:
        match request["how"]:
            case "answers":
                requests.answer({"pid": os.getpid()})
            case "says why and ends":
                sys.exit("the reason")
            case "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hangs":
                time.sleep(600)
            case "hangs in the second":
                requests.begin("the first")
                requests.begin("the second")
                time.sleep(600)
            case "is killed in the second":
                requests.begin("the first")
                requests.begin("the second")
                os.kill(os.getpid(), signal.SIGKILL)
            case "takes its time for each":
                for number in range(2):
                    requests.begin(str(number))
                    time.sleep(0.6)
                requests.answer({})
            case "answers and ends":
                requests.answer({})
                print("after the answer", file=sys.stderr)
                sys.exit(5)


if __name__ == "__main__":
    main()
