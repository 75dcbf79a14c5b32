//! The output of the walk: numbered steps, and under each what was done, what was expected and what happened.

use std::fmt::{self, Display};
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

const DONE_WIDTH: usize = 48;
const EXPECTED_WIDTH: usize = 24;

pub(crate) struct Report {
    colour: bool,
    began: Instant,
    steps: u32,
    held: u32,
    broken: u32,
    /// Whether the step's table already has its header.
    headed: bool,
}

#[derive(Clone, Copy)]
enum Ink {
    Bold,
    Dim,
    Green,
    Red,
}

struct Painted<T>(Option<Ink>, T);

impl<T: Display> Display for Painted<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = match self.0 {
            None => return self.1.fmt(f),
            Some(Ink::Bold) => 1,
            Some(Ink::Dim) => 2,
            Some(Ink::Red) => 31,
            Some(Ink::Green) => 32,
        };
        write!(f, "\x1b[{code}m")?;
        self.1.fmt(f)?;
        write!(f, "\x1b[0m")
    }
}

impl Report {
    pub(crate) fn new() -> Self {
        // https://no-color.org
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let able = std::env::var_os("TERM").is_none_or(|terminal| terminal != "dumb");
        Report {
            colour: wanted && able && std::io::stdout().is_terminal(),
            began: Instant::now(),
            steps: 0,
            held: 0,
            broken: 0,
            headed: false,
        }
    }

    fn paint<T: Display>(&self, ink: Ink, text: T) -> Painted<T> {
        Painted(self.colour.then_some(ink), text)
    }

    pub(crate) fn title(&self, title: &str, about: &str) {
        println!("{}  {about}", self.paint(Ink::Bold, title));
    }

    /// Begins a step. The statements are those that it sends, so that a reader can repeat them.
    pub(crate) fn step(&mut self, title: &str, statements: &[&str]) {
        self.steps += 1;
        println!("\n{}", self.paint(Ink::Bold, format_args!("{:>2}  {title}", self.steps)));
        for line in statements.iter().flat_map(|statement| statement.lines()) {
            println!("      {}", self.paint(Ink::Dim, line));
        }
        self.headed = false;
    }

    /// Compares the result with the expected one. The walk continues after a failed check: later steps may show why.
    pub(crate) fn check(&mut self, done: &str, expected: impl Display, came: impl Display) {
        if !self.headed {
            let head = format!("{:<DONE_WIDTH$}  {:<EXPECTED_WIDTH$}  came", "done", "expected");
            println!("      {}", self.paint(Ink::Dim, head));
            self.headed = true;
        }
        let (expected, came) = (expected.to_string(), came.to_string());
        let holds = expected == came;
        let mark = if holds {
            self.held += 1;
            self.paint(Ink::Green, "✓")
        } else {
            self.broken += 1;
            self.paint(Ink::Red, "✗")
        };
        let ink = if holds { Ink::Green } else { Ink::Red };
        let came = self.paint(ink, came);
        println!("    {mark} {done:<DONE_WIDTH$}  {expected:<EXPECTED_WIDTH$}  {came}");
    }

    pub(crate) fn note(&self, text: impl Display) {
        println!("      {text}");
    }

    pub(crate) fn aside(&self, text: impl Display) {
        println!("      {}", self.paint(Ink::Dim, text));
    }

    /// Reports that the walk cannot continue.
    pub(crate) fn stopped(&mut self, error: &anyhow::Error) {
        self.broken += 1;
        println!("    {} the walk stopped here: {error:#}", self.paint(Ink::Red, "✗"));
    }

    /// Prints the summary; true if every check passed.
    pub(crate) fn conclude(&self) -> bool {
        let (steps, held, broken) = (self.steps, self.held, self.broken);
        let time = seconds(self.began.elapsed());
        if broken == 0 {
            let verdict = format!("All {held} checks of {steps} steps held, in {time}.");
            println!("\n{} {verdict}", self.paint(Ink::Green, "✓"));
        } else {
            let verdict =
                format!("{broken} of {} checks did not hold (steps begun: {steps}, {time}).", held + broken);
            println!("\n{} {verdict}", self.paint(Ink::Red, "✗"));
        }
        broken == 0
    }
}

pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
