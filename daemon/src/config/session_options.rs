//! Options of the commands for sessions.

use clap::{Args, Subcommand};
use jiff::Timestamp;
use uuid::Uuid;

use super::common_options::OutputOptions;

#[derive(Debug, Subcommand)]
pub enum SessionCommand {
    /// List the sessions of a user that can still be refreshed, the oldest first
    #[command(after_help = "Example:\n  tollgated session list ann")]
    List(ListSessionsOptions),
    /// End a session by its id, or all sessions of a user, with their access tokens. Exit status 1 if there was nothing
    /// to end
    #[command(after_help = "Examples:\n  \
                            tollgated session revoke 01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f --reason 'laptop stolen'\n  \
                            tollgated session revoke --user ann --reason 'ann left'")]
    Revoke(RevokeSessionOptions),
    /// End the sessions of all users that were opened or last refreshed before a moment: after a backup was restored,
    /// whose sessions are older than their clients
    #[command(after_help = "Example:\n  tollgated session invalidate --before 2030-01-02T03:04:05Z")]
    Invalidate(InvalidateSessionsOptions),
}

#[derive(Debug, Args)]
pub struct ListSessionsOptions {
    /// The application's own key of the user
    pub user: String,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("which").required(true).multiple(true).args(["id", "user"])))]
pub struct RevokeSessionOptions {
    /// The session's id, as `session list` shows it
    pub id: Option<Uuid>,

    /// With an ID: end it only if it is this user's. Alone: end all sessions of this user
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,

    /// Why, for the audit log
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[derive(Debug, Args)]
pub struct InvalidateSessionsOptions {
    /// The moment, such as 2030-01-02T03:04:05Z
    #[arg(long, value_name = "MOMENT")]
    pub before: Timestamp,

    #[command(flatten)]
    pub output: OutputOptions,
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use crate::config::Cli;

    fn parses(arguments: &[&str]) -> bool {
        Cli::try_parse_from([&["tollgated", "session"], arguments].concat()).is_ok()
    }

    #[test]
    fn a_session_is_ended_by_its_id_or_by_its_user() {
        let id = "01980f2e-8a6b-7c3d-9e4f-5a6b7c8d9e0f";
        for right in [&["revoke", id][..], &["revoke", "--user", "ann"], &["revoke", id, "--user", "ann"]] {
            assert!(parses(right), "{right:?}");
        }
        assert!(!parses(&["revoke"]));
        assert!(!parses(&["revoke", "ann"]));
    }

    #[test]
    fn all_sessions_are_ended_only_before_a_moment_that_is_given_with_its_offset() {
        assert!(parses(&["invalidate", "--before", "2030-01-02T03:04:05Z"]));
        assert!(parses(&["invalidate", "--before", "2030-01-02T03:04:05+02:00"]));
        for wrong in [&["invalidate"][..], &["invalidate", "--before", "2030-01-02T03:04:05"]] {
            assert!(!parses(wrong), "{wrong:?}");
        }
    }
}
