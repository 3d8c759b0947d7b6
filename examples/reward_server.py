"""A service that rewards right answers. `python examples/reward_server.py` listens on port 8765."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Rewards(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in asked["completions"]]
        right = [
            text.strip() == answer for text, answer in zip(texts, asked["columns"]["answer"], strict=True)
        ]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"rewards": [float(one) for one in right]}).encode())


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8765), Rewards).serve_forever()
