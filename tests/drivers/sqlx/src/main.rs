//! Runs what docs/drivers.md shows for sqlx, taken from there as example.rs.
//!
//! Prints one line for each token: the titles, or the status and why it was refused; then the type that retry_after has, and
//! the seconds. The error texts, and what sqlx logs, go to standard error, where no token may appear.

mod example;

use example::{connect, posts, refusal};
use sqlx::postgres::types::PgInterval;

const ADDRESS: &str = "203.0.113.7";

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        eprintln!("{} {}", record.target(), record.args());
    }
    fn flush(&self) {}
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"))
}

fn print(name: &str, result: sqlx::Result<Vec<String>>) {
    match result {
        Ok(titles) => println!("{name} {titles:?}"),
        Err(error) => {
            eprintln!("{error}\n{error:#?}");
            match refusal(&error) {
                Some((status, detail)) => println!("{name} {status} {detail}"),
                None => println!("{name} no refusal"),
            }
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> sqlx::Result<()> {
    log::set_logger(&Logger).expect("the first logger");
    log::set_max_level(log::LevelFilter::Trace);
    let pool = connect(&variable("URL")).await?;
    for name in ["good", "revoked", "narrow", "limited", "limited"] {
        print(name, posts(&pool, &variable(&name.to_uppercase()), ADDRESS).await);
    }
    let wait = "SELECT retry_after, extract(epoch FROM retry_after)::float8 FROM tollgate.verify_api_token($1)";
    let wait = sqlx::query_as::<_, (PgInterval, f64)>(wait).bind(variable("LIMITED")).persistent(false);
    let (PgInterval { .. }, seconds) = wait.fetch_one(&pool).await?;
    println!("retry_after PgInterval f64 {seconds}");
    let lost = sqlx::query("SELECT pg_terminate_backend(pg_backend_pid())").persistent(false).execute(&pool).await;
    print("lost", lost.map(|_| Vec::new()));
    Ok(())
}
