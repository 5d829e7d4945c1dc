"""Logs that are no traces yet: what they are, and how to convert them."""

from __future__ import annotations

import re

# A log, by a line of it, and what to do.
_FOREIGN_LOGS = (
    (
        re.compile(r'\s*\{.*"http_req_duration"'),
        "JSON output of k6",
        """convert it to CSV: (echo time,demand; jq -r 'select(.type=="Point" and .metric=="http_req_duration") """
        "| [.data.time, .data.value / 1000] | @csv' FILE), and read it with sort = true",
    ),
    (
        re.compile(r"\s*[{\[]\s*($|[\"{])"),
        "JSON",
        "convert it to CSV, for JSON lines as by (echo time,demand; jq -r '[.time, .duration] | @csv' FILE) "
        "with the keys of your file",
    ),
    (
        re.compile(r"metric_name,timestamp,metric_value,"),
        "CSV output of k6",
        "keep the rows of http_req_duration: (echo time,demand; "
        """awk -F, '$1 == "http_req_duration" {print $2 "," $3 / 1000}' FILE), and read them with sort = true""",
    ),
    (
        re.compile(r".*\] \S+ \S+/\S+ [\d+-]+(/[\d+-]+){4} "),
        "an HAProxy HTTP log",
        "log with `option httplog clf`, or convert it to CSV with columns time (the accept date) and demand "
        "(Tr, the fourth timer, in seconds)",
    ),
    (
        re.compile(r'\[\d{4}-\d\d-\d\dT[^\]]+\] "'),
        "an Envoy access log",
        "convert it to CSV with columns time (START_TIME) and demand (DURATION, in seconds)",
    ),
    (
        re.compile(r"(https?|h2|grpcs?|wss?) \d{4}-\d\d-\d\dT\S+ app/"),
        "an access log of an AWS Application Load Balancer",
        """convert it to CSV: (echo time,demand; awk '{print $2 "," ($7 < 0 ? 0 : $7)}' FILE), """
        "and read it with sort = true",
    ),
    (
        re.compile(r"#(Version|Fields|Software|Date):"),
        "a W3C extended log",
        "convert it to CSV with columns time and demand (time-taken, in seconds)",
    ),
    (re.compile(r"\s*#"), "a comment", "remove comment lines, as by grep -v '^#'"),
)


def foreign_log(line: str) -> str:
    """Name the foreign format of a line, and how to convert its file; "" if it is not recognised."""
    for pattern, name, conversion in _FOREIGN_LOGS:
        if pattern.match(line):
            return f"this looks like {name}: {conversion}"
    return ""
