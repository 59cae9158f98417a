""" A small Hugging Face Hub on localhost, in memory: what its client needs to load a public model. """
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict
from urllib.parse import unquote

import huggingface_hub.utils

# before 1.0 whether the client is offline is a matter of its session; later ones need nothing
reset_sessions = getattr(huggingface_hub.utils, 'reset_sessions', lambda: None)


class HubServer(ThreadingHTTPServer):
    """Start with `with HubServer() as hub`; the client is to be pointed at `hub.endpoint`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.repositories: Dict[str, Dict[str, bytes]] = {}

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()

    def add(self, repo_id: str, files: Dict[str, bytes]) -> None:
        """Make a repository of these files."""
        self.repositories[repo_id] = files


class _Handler(BaseHTTPRequestHandler):

    protocol_version = 'HTTP/1.1'
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/[^/]+/(.+)', unquote(self.path.partition('?')[0]))
        files = self.server.repositories.get(match[1]) if match else None
        body, headers = b'', {}
        if files is None:
            headers['X-Error-Code'] = 'RepoNotFound'
        else:
            headers['X-Repo-Commit'] = hashlib.sha1(b''.join(files.values())).hexdigest()
            body = files.get(match[2], b'')
            if match[2] not in files:
                headers['X-Error-Code'] = 'EntryNotFound'
        self.send_response(404 if 'X-Error-Code' in headers else 200)
        headers.update({'Content-Length': str(len(body)), 'ETag': f'"{hashlib.sha1(body).hexdigest()}"'})
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    do_HEAD = do_GET
