"""Self-contained HTML reports: one file, no requests, light and dark, readable on a phone.

`pairs.write_pair_report` shows a folder of pairs, `runs.write_run_report` a training run before and after. Everything a
page shows is escaped, and its Content-Security-Policy lets nothing in or out.
"""
