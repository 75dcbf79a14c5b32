//! Whether the server's log holds tokens: bind values are logged unless a role was told otherwise, and auto_explain writes
//! plans, in which PostgreSQL has put the bound values.

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
        let remedy = |setting: &str| {
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
                remedy("log_parameter_max_length"),
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

/// Settings of roles and of this database, those that win first.
const SPECIAL: &str = "special as ( \
    select s.setrole, split_part(c, '=', 1) as name, substr(c, strpos(c, '=') + 1) as value, \
           row_number() over (order by s.setrole = 0, s.setdatabase = 0) as place \
    from pg_db_role_setting s, unnest(s.setconfig) c \
    where s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database())))";

/// Roles that pass tokens to functions: those whose first argument is the text of one.
const EXPOSED: &str = "exposed as ( \
    select r.oid, quote_ident(r.rolname) as name from pg_roles r \
    where r.rolcanlogin \
      and exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace \
                  where n.nspname = 'tollgate' and p.proargnames[1] in ('token', 'parent') \
                    and p.proargtypes[0] = 'text'::regtype \
                    and has_function_privilege(r.oid, p.oid, 'execute')))";

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
            &format!(
                "with {SPECIAL}, {EXPOSED} \
                 select r.name from exposed r \
                 where coalesce((select s.value from special s \
                                 where s.setrole in (r.oid, 0) and s.name = 'log_parameter_max_length' \
                                 order by s.place limit 1), $1) <> '0' \
                 order by 1"
            ),
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

/// What auto_explain writes of the statements of a role that handles tokens.
#[derive(Debug)]
struct Explained {
    /// Quoted.
    role: String,
    /// Output columns and calls of functions too, not conditions alone.
    verbose: bool,
    /// The bind values beside the plan.
    parameters: bool,
}

pub(super) async fn auto_explain(client: &Client) -> Result<Finding> {
    const DOING: &str = "look up what auto_explain writes";
    // It may be loaded for everybody, as in this session, or for some roles. The server's own values hold for its settings
    // where it is not loaded here, too.
    let rows = client
        .query(
            &format!(
                "with {SPECIAL}, {EXPOSED}, server (loaded, log_min_duration, log_verbose, log_parameter_max_length) as ( \
                     select exists (select from pg_settings where name = 'auto_explain.log_min_duration'), \
                            coalesce(current_setting('auto_explain.log_min_duration', true), '-1'), \
                            coalesce(current_setting('auto_explain.log_verbose', true), 'off'), \
                            case when current_setting('server_version_num')::int < 160000 then '0' \
                                 else coalesce(current_setting('auto_explain.log_parameter_max_length', true), '-1') end \
                 ), settings as ( \
                     select r.name, \
                            s.loaded or exists (select from special l where l.setrole in (r.oid, 0) \
                                                and l.name in ('session_preload_libraries', 'local_preload_libraries') \
                                                and l.value like '%auto\\_explain%') as loaded, \
                            {} as log_min_duration, {} as log_verbose, {} as log_parameter_max_length \
                     from exposed r, server s \
                 ) \
                 select name, log_verbose::boolean, log_parameter_max_length !~ '^0+[A-Za-z]*$' \
                 from settings where loaded and log_min_duration not like '-%' order by 1",
                of_role("log_min_duration"),
                of_role("log_verbose"),
                of_role("log_parameter_max_length"),
            ),
            &[],
        )
        .await
        .doing(DOING)?;
    let explained = rows.iter().map(|row| {
        Ok(Explained {
            role: row.try_get(0).doing(DOING)?,
            verbose: row.try_get(1).doing(DOING)?,
            parameters: row.try_get(2).doing(DOING)?,
        })
    });
    let row = client.query_one("select quote_ident(current_database())", &[]).await.doing(DOING)?;
    Ok(explained_finding(&explained.collect::<Result<Vec<_>>>()?, row.try_get(0).doing(DOING)?))
}

/// A setting of auto_explain as it holds for the role `r`.
fn of_role(setting: &str) -> String {
    format!(
        "coalesce((select l.value from special l where l.setrole in (r.oid, 0) \
                   and l.name = 'auto_explain.{setting}' order by l.place limit 1), s.{setting})"
    )
}

fn explained_finding(explained: &[Explained], database: &str) -> Finding {
    const NAME: &str = "auto_explain";
    if explained.is_empty() {
        return Finding::ok(NAME, "it writes no plans of roles that handle tokens");
    }
    let roles = |which: &dyn Fn(&Explained) -> bool| {
        explained.iter().filter(|one| which(one)).map(|one| one.role.as_str()).collect::<Vec<_>>().join(", ")
    };
    let mut detail = format!(
        "it writes the plans of {}, and a plan has bound values in its conditions: a token there is in the log",
        roles(&|_| true)
    );
    for (roles, what) in [
        (roles(&|one| one.verbose), "with log_verbose, in what is selected and in calls of functions too"),
        (roles(&|one| one.parameters), "with log_parameter_max_length, as bind values in any case"),
    ] {
        if !roles.is_empty() {
            detail.push_str(&format!("; of {roles}, {what}"));
        }
    }
    let commands = explained.iter().map(|one| {
        format!("ALTER ROLE {} IN DATABASE {database} SET auto_explain.log_min_duration = -1;", one.role)
    });
    Finding::warn(NAME, detail, commands.collect::<Vec<_>>().join("\n"))
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
                finding.remedy.as_deref(),
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

    #[test]
    fn what_auto_explain_writes_is_told_of_each_role() {
        assert_eq!(explained_finding(&[], "app").verdict, Verdict::Ok);
        let of = |role: &str, verbose, parameters| Explained { role: role.to_owned(), verbose, parameters };
        let plain = explained_finding(&[of("web", false, false)], "\"My app\"");
        assert_eq!(plain.verdict, Verdict::Warn);
        assert!(plain.detail.contains("conditions") && !plain.detail.contains("log_"), "{}", plain.detail);
        let mixed = explained_finding(
            &[of("web", true, false), of("\"My web\"", false, true), of("job", true, true)],
            "app",
        );
        assert!(mixed.detail.contains("of web, job, with log_verbose"), "{}", mixed.detail);
        assert!(mixed.detail.contains("of \"My web\", job, with log_parameter"), "{}", mixed.detail);
        assert_eq!(
            plain.remedy.as_deref(),
            Some("ALTER ROLE web IN DATABASE \"My app\" SET auto_explain.log_min_duration = -1;")
        );
        assert_eq!(mixed.remedy.map(|remedy| remedy.lines().count()), Some(3));
    }
}
