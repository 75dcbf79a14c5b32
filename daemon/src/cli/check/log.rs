//! Whether the server's log holds tokens: bind values are logged unless a role was told otherwise.

use tokio_postgres::Client;

use super::finding::Finding;
use crate::error::{Doing as _, Result};

/// The settings that decide whether bind values, which may be tokens, are logged.
#[derive(Debug, Default)]
struct LogSettings {
    log_statement: String,
    log_min_duration_statement: i64,
    log_min_duration_sample: i64,
    log_transaction_sample_rate: f64,
    log_parameter_max_length_on_error: i64,
    /// Quoted names of roles that handle tokens and whose bind values are not kept out of the log.
    exposed_roles: Vec<String>,
}

impl LogSettings {
    /// What makes statements with their bind values appear in the log.
    fn statements_logged_by(&self) -> Option<String> {
        if self.log_statement == "all" {
            Some("log_statement = all".to_owned())
        } else if self.log_min_duration_statement >= 0 {
            Some(format!("log_min_duration_statement = {}", self.log_min_duration_statement))
        } else if self.log_min_duration_sample >= 0 {
            Some(format!("log_min_duration_sample = {}", self.log_min_duration_sample))
        } else if self.log_transaction_sample_rate > 0.0 {
            Some(format!("log_transaction_sample_rate = {}", self.log_transaction_sample_rate))
        } else {
            None
        }
    }

    fn finding(&self) -> Finding {
        const NAME: &str = "log";
        let mend = |setting: &str| {
            self.exposed_roles
                .iter()
                .map(|role| format!("ALTER ROLE {role} SET {setting} = 0;"))
                .collect::<Vec<_>>()
                .join("\n")
        };
        let exposed = self.exposed_roles.join(", ");
        match self.statements_logged_by() {
            Some(cause) if !self.exposed_roles.is_empty() => Finding::warn(
                NAME,
                format!(
                    "{cause}: the server's log may hold the tokens that {exposed} verify, as bind values"
                ),
                mend("log_parameter_max_length"),
            ),
            _ if self.log_parameter_max_length_on_error != 0 => Finding::warn(
                NAME,
                "log_parameter_max_length_on_error is not 0: statements that fail are logged with their bind values",
                "ALTER SYSTEM SET log_parameter_max_length_on_error = 0; SELECT pg_reload_conf();",
            ),
            Some(cause) => {
                Finding::ok(NAME, format!("{cause}, without the bind values of roles that verify tokens"))
            }
            None => Finding::ok(NAME, "statements are not logged, so neither are the tokens they verify"),
        }
    }
}

pub(super) async fn logging(client: &Client) -> Result<Finding> {
    const DOING: &str = "look up the settings of the log";
    // reset_val is what the session began with, before we set anything. The setting of the server as a whole, which
    // holds for other roles, shows only if nothing more special holds for ours; else the default must be assumed.
    let row = client
        .query_one(
            "select max(reset_val) filter (where name = 'log_statement'), \
                    max(reset_val) filter (where name = 'log_min_duration_statement'), \
                    max(reset_val) filter (where name = 'log_min_duration_sample'), \
                    max(reset_val) filter (where name = 'log_transaction_sample_rate'), \
                    max(reset_val) filter (where name = 'log_parameter_max_length_on_error'), \
                    coalesce(max(reset_val) filter (where name = 'log_parameter_max_length' \
                             and source in ('default', 'configuration file', 'command line')), '-1') \
             from pg_settings where name like 'log\\_%'",
            &[],
        )
        .await
        .doing(DOING)?;
    let text = |column: usize| -> Result<String> {
        Ok(row.try_get::<_, Option<String>>(column).doing(DOING)?.unwrap_or_default())
    };
    let exposed = client
        .query(
            "with special as ( \
                 select s.setrole, s.setdatabase, split_part(c, '=', 2) as value \
                 from pg_db_role_setting s, unnest(s.setconfig) c \
                 where split_part(c, '=', 1) = 'log_parameter_max_length' \
                   and s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database())) \
             ) \
             select quote_ident(r.rolname) from pg_roles r \
             where r.rolcanlogin \
               and exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace \
                           where n.nspname = 'tollgate' \
                             and p.proname in ('verify_api_token', 'authenticate', 'revoke_presented_token') \
                             and has_function_privilege(r.oid, p.oid, 'execute')) \
               and coalesce((select s.value from special s where s.setrole in (r.oid, 0) \
                             order by s.setrole = 0, s.setdatabase = 0 limit 1), $1) <> '0' \
             order by 1",
            &[&text(5)?],
        )
        .await
        .doing(DOING)?;
    Ok(LogSettings {
        log_statement: text(0)?,
        log_min_duration_statement: text(1)?.parse().unwrap_or(-1),
        log_min_duration_sample: text(2)?.parse().unwrap_or(-1),
        log_transaction_sample_rate: text(3)?.parse().unwrap_or(0.0),
        log_parameter_max_length_on_error: text(4)?.parse().unwrap_or(0),
        exposed_roles: exposed.iter().map(|row| row.try_get(0).doing(DOING)).collect::<Result<_>>()?,
    }
    .finding())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::finding::Verdict;

    #[test]
    fn logging_warns_only_when_statements_of_exposed_roles_are_logged() {
        let quiet = || LogSettings {
            log_statement: "none".into(),
            log_min_duration_statement: -1,
            log_min_duration_sample: -1,
            exposed_roles: vec!["app".into(), "\"Other\"".into()],
            ..LogSettings::default()
        };
        assert_eq!(quiet().finding().verdict, Verdict::Ok);
        assert_eq!(LogSettings { log_statement: "mod".into(), ..quiet() }.finding().verdict, Verdict::Ok);
        for loud in [
            LogSettings { log_statement: "all".into(), ..quiet() },
            LogSettings { log_min_duration_statement: 0, ..quiet() },
            LogSettings { log_min_duration_sample: 250, ..quiet() },
            LogSettings { log_transaction_sample_rate: 0.1, ..quiet() },
        ] {
            let finding = loud.finding();
            assert_eq!(finding.verdict, Verdict::Warn, "{loud:?}");
            assert_eq!(
                finding.mend.as_deref(),
                Some(
                    "ALTER ROLE app SET log_parameter_max_length = 0;\nALTER ROLE \"Other\" SET log_parameter_max_length = 0;"
                )
            );
        }
        let hidden = LogSettings { log_statement: "all".into(), exposed_roles: vec![], ..quiet() };
        assert_eq!(hidden.finding().verdict, Verdict::Ok);
        let on_error = LogSettings { log_parameter_max_length_on_error: -1, ..quiet() };
        assert_eq!(on_error.finding().verdict, Verdict::Warn);
    }
}
