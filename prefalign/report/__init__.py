"""Self-contained HTML reports: one file, no requests, light and dark, readable on a phone.

`rows.write_report` shows a folder of rows (pairs by `pairs.write_pair_report`), `runs.write_run_report` a training run before
and after. Everything a page shows is escaped, and its Content-Security-Policy lets nothing in or out.
"""
