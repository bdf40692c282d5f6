"""``report.html``: a run as one page that needs no network and executes nothing but its own script."""
