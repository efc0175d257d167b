"""Work to confine: what each request asks for."""

from __future__ import annotations

import os
import time
from typing import Any, final


@final
class _Work:
    def answer(self, request: Any) -> Any:
        match request:
            case "burn":
                while True:
                    pass
            case "fail":
                raise ValueError("it failed")
            case "end":
                os._exit(3)
            case "hoard":
                return len(bytes(2**33))
            case "print":
                print("not a reply", flush=True)
            case ["sleep", seconds]:
                time.sleep(seconds)
            case _:
                pass
        return request


def start() -> _Work:
    return _Work()
