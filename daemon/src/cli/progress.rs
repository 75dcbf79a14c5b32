//! How long work shows that it goes on: on standard error, and only if that is a terminal.

use std::time::Duration;

use indicatif::{HumanCount, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

/// `total` is how much there is to do, where that is known; `unit` is what is counted.
pub(super) fn bar(message: &'static str, total: Option<u64>, unit: &'static str, quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let progress = ProgressBar::with_draw_target(total, target);
    let template = match total {
        Some(_) => "{msg} {wide_bar} {percent}%, {eta} left",
        None => "{spinner} {msg}: {human_pos} {unit}, {rate} {unit}/s, {elapsed}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        let style = style
            .with_key("unit", move |_: &ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = out.write_str(unit);
            })
            .with_key("rate", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = out.write_str(&rate(state.pos(), state.elapsed()));
            });
        progress.set_style(style);
    }
    progress.set_message(message);
    progress
}

/// How many a second, as `184,880`.
pub(super) fn rate(count: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    let rate = if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    HumanCount(rate.round() as u64).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_whole_number_with_separators() {
        assert_eq!(rate(369_761, Duration::from_secs(2)), "184,881");
        assert_eq!(rate(7, Duration::ZERO), "0");
    }
}
