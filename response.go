package zejzlauth

import (
	"bufio"
	"io"
	"net"
	"net/http"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// response is the one writer that the guard puts around the server's. It
// finishes the headers at the final status and passes all else through:
// bodies, flushes, deadlines, trailers and informational responses.
//
// Every method that can commit the header is overridden. The wrapper that it
// embeds promotes ReadFrom, so an io.Copy from behind would else pass by
// WriteHeader.
type response struct {
	caddyhttp.ResponseWriterWrapper
	answer

	// committed: the final header was written or the connection taken over;
	// the guard has no more say in this response.
	committed bool
}

// WriteHeader implements http.ResponseWriter. 101 ends the HTTP exchange, so
// it is final although it is informational.
func (w *response) WriteHeader(status int) {
	switch {
	case w.committed:
	case status >= http.StatusOK || status == http.StatusSwitchingProtocols:
		w.commit()
	default:
		w.dropBackendHeaders(w.Header())
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements http.ResponseWriter.
func (w *response) Write(p []byte) (int, error) {
	w.implicitOK()
	return w.ResponseWriter.Write(p)
}

// ReadFrom implements io.ReaderFrom.
func (w *response) ReadFrom(r io.Reader) (int64, error) {
	w.implicitOK()
	return w.ResponseWriterWrapper.ReadFrom(r)
}

// FlushError is what http.ResponseController looks for.
func (w *response) FlushError() error {
	w.implicitOK()
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Hijack is what http.ResponseController looks for.
func (w *response) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	w.committed = w.committed || err == nil
	return conn, rw, err
}

func (w *response) implicitOK() {
	if !w.committed {
		w.WriteHeader(http.StatusOK)
	}
}

func (w *response) commit() {
	w.committed = true
	w.finish(w.Header())
}

// Interface guards
var (
	_ http.ResponseWriter             = (*response)(nil)
	_ io.ReaderFrom                   = (*response)(nil)
	_ interface{ FlushError() error } = (*response)(nil)
	_ http.Hijacker                   = (*response)(nil)
	_ http.Pusher                     = (*response)(nil)
)
