"""moto's S3 server on a free port of loopback. Says the port on stdout; ends with its stdin, so with the tests."""

import os
import sys
import threading

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


class Conditional:
    """moto looks for a key and then puts it; S3 does both at once. So these puts, and no others, come one by one."""

    def __init__(self, app):
        self.app = app
        self.one = threading.Lock()

    def __call__(self, environ, start_response):
        if "HTTP_IF_NONE_MATCH" not in environ:
            return self.app(environ, start_response)
        with self.one:
            return self.app(environ, start_response)


def main():
    app = Conditional(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


main()
