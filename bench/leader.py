"""`millstream pack` in this process, which leads workers of its own; then what it took itself, without them.

Run as `python bench/leader.py pack ...`, with what the command takes; the last line that it prints is one of JSON:
`seconds` of CPU time since this process began, all of its threads included.
"""

import json
import time

from millstream.cli import main

if __name__ == "__main__":
    main()  # which ends the process if it fails
    print(json.dumps({"seconds": time.process_time()}))
