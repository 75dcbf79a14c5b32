//! Parse, run, exit code.

use std::process::ExitCode;

use tollgated::cli;
use tollgated::config;
use tollgated::config::sources;
use tollgated::config::sources::Refusal;
use tollgated::error::Kind;
use tollgated::process::exit;
use tollgated::process::printable;

fn main() -> ExitCode {
    let result = match sources::load(std::env::args_os()) {
        Ok(configuration) => cli::run(configuration),
        Err(Refusal::CommandLine(error)) => return print_clap_error(&error),
        Err(Refusal::Faults(error)) => Err(error),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            if error.kind() != Kind::BrokenPipe {
                eprintln!("tollgated: {}", error.report());
            }
            ExitCode::from(exit::code(error.kind()))
        }
    }
}

/// Prints what clap has to say, which is also how help and version come out.
fn print_clap_error(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // If this fails there is nowhere left to report it.
        let _ = error.print();
        return ExitCode::from(exit::OK);
    }
    let arguments: Vec<String> =
        std::env::args_os().skip(1).map(|argument| argument.to_string_lossy().into_owned()).collect();
    let text = error.render().to_string();
    let text = config::mask_arguments(&text, arguments.iter().map(String::as_str));
    eprint!("{}", printable::escape_lines(&text, ""));
    ExitCode::from(exit::USAGE)
}
