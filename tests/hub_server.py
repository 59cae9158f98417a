""" A small Hugging Face Hub on localhost, in memory, for the tests: what its client needs to load a model. """
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, NamedTuple, Optional, Tuple
from urllib.parse import unquote

import huggingface_hub.utils

TOKEN = 'hf_of_the_tests'

# before 1.0 whether the client is offline is a matter of its session; later ones need nothing
reset_sessions = getattr(huggingface_hub.utils, 'reset_sessions', lambda: None)


class Repository(NamedTuple):
    private: bool
    commits: Dict[str, Dict[str, bytes]]  # files by revision; the last one is also 'main'


class HubServer(ThreadingHTTPServer):
    """Start with `with HubServer() as hub`; the client is to be pointed at `hub.endpoint`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.repositories: Dict[str, Repository] = {}
        self.requests: List[Tuple[str, str]] = []  # method and path

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self.shutdown()
        self.server_close()

    def add(self, repo_id: str, files: Dict[str, bytes], private: bool = False) -> str:
        """Commit files to a repository, made if it does not exist; returns the sha."""
        repository = self.repositories.setdefault(repo_id, Repository(private, {}))
        sha = hashlib.sha1(b''.join(files.values()) + bytes(len(repository.commits))).hexdigest()
        repository.commits[sha] = repository.commits['main'] = files
        return sha


class _Handler(BaseHTTPRequestHandler):

    protocol_version = 'HTTP/1.1'
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.partition('?')[0])
        self.server.requests.append((self.command, path))
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        if not match:
            return self._send(404, error=('NotFound', f'this server has no {path}'))
        repo_id, revision, filename = match.groups()
        repository = self.server.repositories.get(repo_id)
        authorised = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        if repository is None or (repository.private and not authorised):
            # as the Hub: without a token one does not learn whether a repository exists
            return self._send(404 if authorised else 401, error=('RepoNotFound', 'Repository not found'))
        if revision not in repository.commits:
            return self._send(404, error=('RevisionNotFound', f'Invalid rev id: {revision}'))
        files = repository.commits[revision]
        sha = next(sha for sha, other in repository.commits.items() if other is files and sha != 'main')
        if filename not in files:
            return self._send(404, error=('EntryNotFound', f'{filename} does not exist'), sha=sha)
        self._send(200, files[filename], sha=sha)

    do_HEAD = do_GET

    def _send(
            self,
            status: int,
            body: bytes = b'',
            error: Optional[Tuple[str, str]] = None,
            sha: Optional[str] = None,
    ) -> None:
        self.send_response(status)
        headers = {'Content-Length': str(len(body)), 'ETag': f'"{hashlib.sha1(body).hexdigest()}"'}
        if error:
            headers['X-Error-Code'], headers['X-Error-Message'] = error
        if sha:
            headers['X-Repo-Commit'] = sha
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
