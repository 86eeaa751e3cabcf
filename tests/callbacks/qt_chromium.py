"""Qt's Chromium (`pip install pyside6-webengine`) as a headless browser: python qt_chromium.py PORT."""

import os
import sys

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_REMOTE_DEBUGGING"] = sys.argv[1]
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu --remote-allow-origins=*"

from PySide6.QtCore import QUrl  # noqa: E402  # the variables above are read when it is imported
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402

application = QApplication(sys.argv[:1])
view = QWebEngineView()
view.load(QUrl("about:blank"))
view.resize(1280, 900)
view.show()
sys.exit(application.exec())
