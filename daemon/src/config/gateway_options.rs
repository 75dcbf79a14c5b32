//! Options of the API's own database login.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::common_options::bounded;
use crate::error::Result;
use crate::postgres::target::Target;
use crate::secret::Secret;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "API")]
pub struct GatewayOptions {
    /// The database, as the API asks it for those who call: a connection string as for --database-url, of a role with the
    /// capability gateway and no other. Without it --api-address serves /events alone
    #[arg(
        long,
        value_name = "URL",
        env = "TOLLGATED_API_DATABASE_URL",
        hide_env_values = true,
        value_parser = Secret::parse
    )]
    pub api_database_url: Option<Secret>,

    /// Read the password of that role from the first line of this file, at each connection
    #[arg(long, value_name = "PATH", env = "TOLLGATED_API_PASSWORD_FILE")]
    pub api_password_file: Option<PathBuf>,

    /// Longest time that the API waits for the database; then it answers 503
    #[arg(long, value_name = "TIME", env = "TOLLGATED_API_TIMEOUT", default_value = "5s", value_parser = timeout)]
    pub api_timeout: Duration,
}

impl GatewayOptions {
    /// `None` if the API has no login.
    pub fn target(&self) -> Result<Option<Target>> {
        let named = self.api_database_url.as_ref().filter(|url| !url.expose().trim().is_empty());
        named
            .map(|url| {
                Target::parse(url, self.api_password_file.as_deref(), "tollgated api", self.api_timeout)
            })
            .transpose()
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    bounded(text, Duration::from_millis(100), Duration::from_secs(60))
}
