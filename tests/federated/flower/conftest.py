"""The app in `app/` is a Flower app like any other: run, not collected."""

collect_ignore = ["app"]
