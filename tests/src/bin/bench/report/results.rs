//! The results of a run, as its JSON has them.

use serde::{Deserialize, Serialize};

use super::machine::Machine;
use crate::measure::Series;

/// The results of one run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The command line of the run; of several, with "` and `" between them.
    pub(crate) command: String,
    pub(crate) began_at: jiff::Timestamp,
    /// Whether the sizes were so small that the figures mean nothing.
    pub(crate) quick: bool,
    pub(crate) machine: Machine,
    pub(crate) versions: Vec<Version>,
}

impl Report {
    /// Adds what another run measured. Parts that both have are the other's.
    pub(crate) fn add(&mut self, other: Self) {
        if !self.command.split("` and `").any(|command| command == other.command) {
            self.command = format!("{}` and `{}", self.command, other.command);
        }
        self.quick |= other.quick;
        for version in other.versions {
            let Some(mine) = self.versions.iter_mut().find(|mine| mine.major == version.major) else {
                self.versions.push(version);
                continue;
            };
            for part in version.parts {
                match mine.parts.iter_mut().find(|mine| mine.part == part.part) {
                    Some(mine) => *mine = part,
                    None => mine.parts.push(part),
                }
            }
        }
    }
}

/// The results on one PostgreSQL.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Version {
    pub(crate) postgres: String,
    pub(crate) major: u32,
    pub(crate) parts: Vec<Measured>,
}

/// The results of one part.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) part: String,
    pub(crate) seconds: f64,
    pub(crate) conditions: Vec<String>,
    pub(crate) figures: Vec<Figure>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) unit: Unit,
    pub(crate) target: Option<Target>,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// One per round.
    pub(crate) values: Vec<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    Ratio,
    PerSecond,
    Milliseconds,
    Microseconds,
    Nanoseconds,
    Bytes,
    Rows,
    Percent,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Figure {
    pub(crate) fn new(what: &str, unit: Unit, series: &Series) -> Self {
        Self {
            what: what.to_owned(),
            unit,
            target: None,
            median: series.median(),
            min: series.min(),
            max: series.max(),
            values: series.0.clone(),
        }
    }

    pub(crate) fn at_least(mut self, target: f64) -> Self {
        self.target = Some(Target::AtLeast(target));
        self
    }

    pub(crate) fn at_most(mut self, target: f64) -> Self {
        self.target = Some(Target::AtMost(target));
        self
    }

    /// Whether the median reaches the target, if there is one. A value that could not be measured does not.
    pub(crate) fn met(&self) -> Option<bool> {
        Some(match self.target? {
            Target::AtLeast(target) => self.median >= target,
            Target::AtMost(target) => self.median <= target,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_by_the_median() {
        let figure = Figure::new("x", Unit::Ratio, &Series(vec![0.5, 1.2, 1.3]));
        assert_eq!(figure.clone().met(), None);
        assert_eq!(figure.clone().at_least(1.2).met(), Some(true));
        assert_eq!(figure.clone().at_least(1.21).met(), Some(false));
        assert_eq!(figure.clone().at_most(1.2).met(), Some(true));
        assert_eq!(figure.at_most(1.19).met(), Some(false));
    }

    #[test]
    fn a_value_that_could_not_be_measured_meets_no_target() {
        let nothing = Figure::new("x", Unit::Ratio, &Series::default());
        assert_eq!(nothing.clone().at_least(0.0).met(), Some(false));
        assert_eq!(nothing.at_most(9.9).met(), Some(false));
    }
}
