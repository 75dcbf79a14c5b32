// run [careless]: runs what docs/drivers.md shows for pgx, taken from there as example.go.
//
// Prints one line for each token: the titles, or the status and why it was refused; then the type that retry_after has, and
// the seconds. The error texts go to standard error, where no token may appear.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"
	"strings"
)

const address = "203.0.113.7"
const lose = "SELECT pg_terminate_backend(pg_backend_pid())"

func attempt(name string, call func() ([]string, error)) {
	titles, err := call()
	if err == nil {
		text, _ := json.Marshal(titles)
		fmt.Println(name, string(text))
		return
	}
	fmt.Fprintf(os.Stderr, "%v\n%+v\n%#v\n", err, err, err)
	if refused := refusal(err); refused != nil {
		text, _ := json.Marshal(map[string]any{"code": refused.Code, "retry_after": refused.RetryAfter})
		fmt.Println(name, refused.Status, string(text))
	} else {
		fmt.Println(name, "no refusal")
	}
}

func main() {
	ctx := context.Background()
	pool, err := connect(ctx, os.Getenv("URL"))
	if err != nil {
		log.Fatal(err)
	}
	defer pool.Close()
	if len(os.Args) > 1 {
		log.Fatal(carelessPosts(ctx, pool, os.Getenv("CARELESS")))
	}
	for _, name := range []string{"good", "revoked", "narrow", "limited", "limited"} {
		attempt(name, func() ([]string, error) {
			return posts(ctx, pool, os.Getenv(strings.ToUpper(name)), address)
		})
	}
	var retryAfter any
	var seconds float64
	wait := "SELECT retry_after, extract(epoch FROM retry_after)::float8 FROM tollgate.verify_api_token($1)"
	if err := pool.QueryRow(ctx, wait, os.Getenv("LIMITED")).Scan(&retryAfter, &seconds); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("retry_after %T %T %v\n", retryAfter, seconds, seconds)
	attempt("lost", func() ([]string, error) {
		_, err := pool.Exec(ctx, lose)
		return nil, err
	})
}
