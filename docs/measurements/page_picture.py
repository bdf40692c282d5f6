"""Take the picture of the page, desktop and phone side by side: ``python docs/measurements/page_picture.py RUN_FOLDER``.

Needs chromium; writes docs/figures/report_page.png.
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "reporting"))

from chromium import chromium  # noqa: E402

HEIGHT, MARGIN = 1420, 20
WINDOWS = ({"width": 1240, "phone": False}, {"width": 390, "phone": True})


def main(folder: Path) -> None:
    """Open the page of ``folder``, choose the first suite where there are several, keep both pictures in one file."""
    pictures = []
    with chromium() as browser:
        for window in WINDOWS:
            browser.open(folder / "report.html", height=HEIGHT, **window)
            browser.wait("document.documentElement.dataset.ready === 'yes'")
            suites = "#case-table select[aria-label=Suite]"
            if browser.run(f"document.querySelector('{suites}') !== null"):
                browser.choose(suites, "compression")
            kept = folder / ".picture.png"
            browser.screenshot(kept)
            pictures.append(
                Image.open(BytesIO(kept.read_bytes())).resize((window["width"], HEIGHT), Image.Resampling.LANCZOS)
            )
            kept.unlink()
    both = Image.new("RGB", (sum(one.width + 2 * MARGIN for one in pictures), HEIGHT + 2 * MARGIN), "#d9dde1")
    left = MARGIN
    for picture in pictures:
        both.paste(picture, (left, MARGIN))
        left += picture.width + 2 * MARGIN
    both.save(ROOT / "docs" / "figures" / "report_page.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
