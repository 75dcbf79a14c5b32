//! Where PostgreSQL writes or shows tokens: its log has the text of statements and their bind values, auto_explain writes
//! plans, in which PostgreSQL has put the bound values, and pgaudit, pg_stat_statements and pg_stat_activity have texts too.
//!
//! Bind values and texts are two findings. An application that binds its tokens is not concerned by the second, but nothing
//! here can tell whether it does.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::Client;

use super::finding::Finding;
use crate::error::{Doing as _, Result};

/// The settings that decide what is written, with the value that keeps tokens out.
const SETTINGS: [(&str, &str); 15] = [
    ("log_statement", "none"),
    ("log_min_duration_statement", "-1"),
    ("log_min_duration_sample", "-1"),
    ("log_transaction_sample_rate", "0"),
    ("log_min_error_statement", "panic"),
    ("log_parameter_max_length", "0"),
    ("log_parameter_max_length_on_error", "0"),
    ("debug_print_parse", "off"),
    ("debug_print_rewritten", "off"),
    ("debug_print_plan", "off"),
    ("pgaudit.log", "none"),
    ("pgaudit.log_parameter", "off"),
    ("pgaudit.log_statement", "off"),
    ("pg_stat_statements.track", "none"),
    ("pg_stat_statements.track_utility", "off"),
];

/// More roles than this are not named one by one.
const MOST_ROLES: usize = 20;

/// A role that handles tokens, and the settings as they hold for it.
#[derive(Debug, Default)]
struct Handler {
    /// Quoted.
    role: String,
    superuser: bool,
    /// Without those of modules that are not loaded.
    settings: BTreeMap<String, String>,
}

impl Handler {
    fn value(&self, setting: &str) -> Option<&str> {
        self.settings.get(setting).map(String::as_str)
    }

    fn is_on(&self, setting: &str) -> bool {
        let value = self.value(setting).unwrap_or_default().to_ascii_lowercase();
        value == "on"
            || value == "1"
            || ["true", "yes"].iter().any(|on| !value.is_empty() && on.starts_with(&value))
    }

    fn is(&self, setting: &str, values: &[&str]) -> bool {
        self.value(setting).is_some_and(|value| values.iter().any(|one| value.eq_ignore_ascii_case(one)))
    }

    /// A length or a share that is not 0: `0`, `0kB`, `0.0`.
    fn is_more_than_nothing(&self, setting: &str) -> bool {
        self.value(setting).is_some_and(|value| value.chars().any(|c| matches!(c, '1'..='9' | '-')))
    }

    /// The settings that have statements written which do not fail.
    fn logged_by(&self) -> Vec<&'static str> {
        let threshold = |setting| self.value(setting).is_some_and(|value| !value.starts_with('-'));
        let mut settings = Vec::new();
        // DDL may have a token in it only by far-fetched means.
        if self.is("log_statement", &["all", "mod"]) {
            settings.push("log_statement");
        }
        settings.extend(
            ["log_min_duration_statement", "log_min_duration_sample"].into_iter().filter(|s| threshold(s)),
        );
        if self.is_more_than_nothing("log_transaction_sample_rate") {
            settings.push("log_transaction_sample_rate");
        }
        settings
    }

    /// Whether pgaudit writes statements of any class.
    fn is_audited(&self) -> bool {
        self.value("pgaudit.log")
            .is_some_and(|classes| !classes.trim().is_empty() && !classes.eq_ignore_ascii_case("none"))
    }

    /// The settings by which the log gets bind values, each with the one to change.
    fn bind_values_by(&self) -> Vec<(&'static str, &'static str)> {
        let mut causes = Vec::new();
        if self.is_more_than_nothing("log_parameter_max_length") {
            causes.extend(self.logged_by().into_iter().map(|cause| (cause, "log_parameter_max_length")));
        }
        if self.is_more_than_nothing("log_parameter_max_length_on_error") {
            causes.push(("log_parameter_max_length_on_error", "log_parameter_max_length_on_error"));
        }
        if self.is_on("debug_print_plan") {
            causes.push(("debug_print_plan", "debug_print_plan"));
        }
        if self.is_audited() && self.is_on("pgaudit.log_parameter") {
            causes.push(("pgaudit.log_parameter", "pgaudit.log_parameter"));
        }
        causes
    }

    /// The settings by which the log gets the texts of statements.
    fn texts_by(&self) -> Vec<(&'static str, &'static str)> {
        let mut causes = self.logged_by();
        // A message of the level LOG, such as of a wait for a lock, and of FATAL, such as of a session that is ended, have the
        // statement with them too. What a superuser types is the superuser's to know; applications log in as others.
        if !self.superuser && !self.is("log_min_error_statement", &["panic"]) {
            causes.push("log_min_error_statement");
        }
        let printed = ["debug_print_parse", "debug_print_rewritten", "debug_print_plan"];
        causes.extend(printed.into_iter().filter(|setting| self.is_on(setting)));
        // Before its version 16 it has no such setting.
        if self.is_audited()
            && (self.value("pgaudit.log_statement").is_none() || self.is_on("pgaudit.log_statement"))
        {
            causes.push("pgaudit.log");
        }
        causes.into_iter().map(|cause| (cause, cause)).collect()
    }
}

/// What of some handlers is written by which settings, for whom, and the statements that end it.
fn causes_and_commands(
    handlers: &[Handler],
    database: &str,
    causes_of: impl Fn(&Handler) -> Vec<(&'static str, &'static str)>,
) -> Option<(String, String)> {
    let mut causes: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut changes: BTreeMap<&'static str, BTreeSet<&str>> = BTreeMap::new();
    for handler in handlers {
        for (cause, change) in causes_of(handler) {
            let cause = format!("{cause} = {}", handler.value(cause).unwrap_or_default());
            causes.entry(cause).or_default().push(&handler.role);
            changes.entry(change).or_default().insert(&handler.role);
        }
    }
    if causes.is_empty() {
        return None;
    }
    let causes = causes.iter().map(|(cause, roles)| format!("{cause} ({})", some_of(roles)));
    let commands = changes.iter().flat_map(|(setting, roles)| {
        let off = SETTINGS.iter().find(|(name, _)| name == setting).map_or("0", |(_, off)| off);
        if roles.len() > MOST_ROLES {
            return vec![format!("ALTER DATABASE {database} SET {setting} = {off};")];
        }
        let each = |role| format!("ALTER ROLE {role} IN DATABASE {database} SET {setting} = {off};");
        roles.iter().map(each).collect()
    });
    Some((causes.collect::<Vec<_>>().join("; "), commands.collect::<Vec<_>>().join("\n")))
}

fn some_of(roles: &[&str]) -> String {
    match roles.len().checked_sub(MOST_ROLES) {
        Some(more @ 1..) => format!("{} and {more} more", roles[..MOST_ROLES].join(", ")),
        _ => roles.join(", "),
    }
}

fn bind_values(handlers: &[Handler], database: &str) -> Finding {
    const NAME: &str = "log";
    match causes_and_commands(handlers, database, Handler::bind_values_by) {
        Some((causes, commands)) => Finding::warn(
            NAME,
            format!(
                "the server's log may hold the bind values, and so the tokens, of roles that handle them, by {causes}"
            ),
            commands,
        ),
        None => Finding::ok(NAME, "the server's log holds no bind values of roles that handle tokens"),
    }
}

fn texts(handlers: &[Handler], database: &str) -> Finding {
    const NAME: &str = "statements";
    match causes_and_commands(handlers, database, Handler::texts_by) {
        Some((causes, commands)) => Finding::warn(
            NAME,
            format!(
                "the server's log may hold statements of roles that handle tokens, by {causes}. A token that is bound is not \
                 in it; one that is written into the statement is. Bind them, or do without these statements in the log"
            ),
            commands,
        ),
        None => Finding::ok(
            NAME,
            "the server's log holds no statements of roles that handle tokens, or of superusers those alone that fail",
        ),
    }
}

fn statistics(handlers: &[Handler], database: &str) -> Finding {
    const NAME: &str = "pg_stat_statements";
    const SETTING: &str = "pg_stat_statements.track_utility";
    let causes = |handler: &Handler| {
        let kept = handler.is_on(SETTING) && !handler.is("pg_stat_statements.track", &["none"]);
        if kept { vec![(SETTING, SETTING)] } else { Vec::new() }
    };
    match causes_and_commands(handlers, database, causes) {
        Some((causes, commands)) => Finding::warn(
            NAME,
            format!(
                "it keeps statements such as DO and COPY with what is written into them, by {causes}: a token there is shown to \
                 every role that may read it. Bind tokens, or have it leave these statements out"
            ),
            commands,
        ),
        None => Finding::ok(NAME, "it keeps no statement with what is written into it"),
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
    select r.oid, quote_ident(r.rolname) as name, r.rolsuper as superuser from pg_roles r \
    where r.rolcanlogin \
      and exists (select from pg_proc p join pg_namespace n on n.oid = p.pronamespace \
                  where n.nspname = 'tollgate' and p.proargnames[1] in ('token', 'parent') \
                    and p.proargtypes[0] = 'text'::regtype \
                    and has_function_privilege(r.oid, p.oid, 'execute')))";

pub(super) async fn logging(client: &Client) -> Result<Vec<Finding>> {
    const DOING: &str = "look up the settings of the log";
    // reset_val is what the session began with, before we set anything. The setting of the server as a whole, which
    // holds for other roles, shows only if nothing more special holds for ours; else the default must be assumed.
    let names: Vec<&str> = SETTINGS.iter().map(|(name, _)| *name).collect();
    let rows = client
        .query(
            &format!(
                "with {SPECIAL}, {EXPOSED}, server as ( \
                     select s.name, case when s.source in ('default', 'configuration file', 'command line') then s.reset_val \
                                         else s.boot_val end as value \
                     from pg_settings s where s.name = any ($1) \
                 ) \
                 select r.name, r.superuser, s.name, \
                        coalesce((select l.value from special l where l.setrole in (r.oid, 0) and l.name = s.name \
                                  order by l.place limit 1), s.value) \
                 from exposed r, server s order by 1"
            ),
            &[&names],
        )
        .await
        .doing(DOING)?;
    let mut handlers: Vec<Handler> = Vec::new();
    for row in &rows {
        let role: String = row.try_get(0).doing(DOING)?;
        if handlers.last().is_none_or(|last| last.role != role) {
            let superuser = row.try_get(1).doing(DOING)?;
            handlers.push(Handler { role, superuser, settings: BTreeMap::new() });
        }
        if let Some(handler) = handlers.last_mut() {
            handler.settings.insert(row.try_get(2).doing(DOING)?, row.try_get(3).doing(DOING)?);
        }
    }
    let row = client.query_one("select quote_ident(current_database())", &[]).await.doing(DOING)?;
    let database: String = row.try_get(0).doing(DOING)?;
    Ok(vec![
        bind_values(&handlers, &database),
        texts(&handlers, &database),
        statistics(&handlers, &database),
        activity(client).await?,
    ])
}

/// Who sees what others run at this moment. Nothing is wrong with that, and nothing can be done about it but to bind tokens.
async fn activity(client: &Client) -> Result<Finding> {
    const DOING: &str = "look up who sees the statements of others";
    let rows = client
        .query(
            "select quote_ident(r.rolname) from pg_roles r \
             where r.rolcanlogin and not r.rolsuper and pg_has_role(r.oid, 'pg_read_all_stats', 'usage') order by 1",
            &[],
        )
        .await
        .doing(DOING)?;
    let watchers = rows.iter().map(|row| row.try_get(0).doing(DOING)).collect::<Result<Vec<String>>>()?;
    Ok(watched(&watchers))
}

fn watched(watchers: &[String]) -> Finding {
    const NAME: &str = "activity";
    if watchers.is_empty() {
        return Finding::ok(NAME, "none but superusers sees in pg_stat_activity what others run");
    }
    let names: Vec<&str> = watchers.iter().map(String::as_str).collect();
    Finding::ok(
        NAME,
        format!(
            "{} and superusers see in pg_stat_activity what others run, with tokens that are written into it, not those that \
             are bound",
            some_of(&names)
        ),
    )
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
        "it writes the plans of {}, with the text of the statement, and with bound values in conditions: a token there is in \
         the log",
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

    /// As PostgreSQL is by default, but for these.
    fn handler(role: &str, changed: &[(&str, &str)]) -> Handler {
        let default = [
            ("log_statement", "none"),
            ("log_min_duration_statement", "-1"),
            ("log_min_duration_sample", "-1"),
            ("log_transaction_sample_rate", "0"),
            ("log_min_error_statement", "error"),
            ("log_parameter_max_length", "-1"),
            ("log_parameter_max_length_on_error", "0"),
            ("debug_print_parse", "off"),
            ("debug_print_rewritten", "off"),
            ("debug_print_plan", "off"),
        ];
        let settings =
            default.iter().chain(changed).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Handler { role: role.to_owned(), superuser: false, settings: settings.collect() }
    }

    const QUIET: (&str, &str) = ("log_min_error_statement", "panic");

    #[test]
    fn each_setting_that_has_bind_values_logged_is_named_with_its_end() {
        assert_eq!(bind_values(&[handler("app", &[])], "db").verdict, Verdict::Ok);
        for (changed, fixed) in [
            (&[("log_statement", "ALL")][..], "log_parameter_max_length = 0"),
            (&[("log_statement", "mod")], "log_parameter_max_length = 0"),
            (&[("log_min_duration_statement", "0")], "log_parameter_max_length = 0"),
            (&[("log_min_duration_sample", "250ms")], "log_parameter_max_length = 0"),
            (&[("log_transaction_sample_rate", "0.1")], "log_parameter_max_length = 0"),
            (&[("log_parameter_max_length_on_error", "-1")], "log_parameter_max_length_on_error = 0"),
            (&[("debug_print_plan", "yes")], "debug_print_plan = off"),
            (&[("pgaudit.log", "read"), ("pgaudit.log_parameter", "on")], "pgaudit.log_parameter = off"),
        ] {
            let finding = bind_values(&[handler("app", changed), handler("\"Other\"", &[])], "\"My db\"");
            assert_eq!(finding.verdict, Verdict::Warn, "{changed:?}");
            let name = changed[changed.len() - 1].0;
            assert!(
                finding.detail.contains(&format!("{name} = ")) && finding.detail.contains("(app)"),
                "{}",
                finding.detail
            );
            assert_eq!(
                finding.remedy.as_deref(),
                Some(format!("ALTER ROLE app IN DATABASE \"My db\" SET {fixed};").as_str())
            );
        }
        for hidden in ["0", "0kB"] {
            let changed = [("log_statement", "all"), ("log_parameter_max_length", hidden)];
            assert_eq!(bind_values(&[handler("app", &changed)], "db").verdict, Verdict::Ok, "{hidden}");
        }
        for harmless in
            [("log_statement", "ddl"), ("pgaudit.log_parameter", "on"), ("debug_print_plan", "no")]
        {
            assert_eq!(
                bind_values(&[handler("app", &[harmless])], "db").verdict,
                Verdict::Ok,
                "{harmless:?}"
            );
        }
    }

    #[test]
    fn each_setting_that_has_statements_logged_is_named_with_its_end() {
        let by_default = texts(&[handler("app", &[])], "db");
        assert_eq!(by_default.verdict, Verdict::Warn);
        assert!(by_default.detail.contains("log_min_error_statement = error (app)"), "{}", by_default.detail);
        assert_eq!(
            by_default.remedy.as_deref(),
            Some("ALTER ROLE app IN DATABASE db SET log_min_error_statement = panic;")
        );
        assert_eq!(texts(&[handler("app", &[QUIET])], "db").verdict, Verdict::Ok);
        assert_eq!(texts(&[Handler { superuser: true, ..handler("root", &[]) }], "db").verdict, Verdict::Ok);
        for (setting, value) in [
            ("log_min_error_statement", "fatal"),
            ("log_min_error_statement", "LOG"),
            ("log_statement", "all"),
            ("log_statement", "mod"),
            ("log_min_duration_statement", "1s"),
            ("log_min_duration_sample", "0"),
            ("log_transaction_sample_rate", "1"),
            ("debug_print_parse", "on"),
            ("debug_print_rewritten", "true"),
            ("debug_print_plan", "1"),
            ("pgaudit.log", "function, read"),
        ] {
            let finding = texts(&[handler("app", &[QUIET, (setting, value)])], "db");
            assert_eq!(finding.verdict, Verdict::Warn, "{setting} = {value}");
            let off = SETTINGS.iter().find(|(name, _)| *name == setting).unwrap().1;
            let command = format!("ALTER ROLE app IN DATABASE db SET {setting} = {off};");
            assert_eq!(finding.remedy.as_deref(), Some(command.as_str()));
            assert_eq!(
                texts(&[handler("app", &[QUIET, (setting, off)])], "db").verdict,
                Verdict::Ok,
                "{command}"
            );
        }
        let without_text = [QUIET, ("pgaudit.log", "all"), ("pgaudit.log_statement", "off")];
        assert_eq!(texts(&[handler("app", &without_text)], "db").verdict, Verdict::Ok);
    }

    #[test]
    fn utility_statements_in_the_statistics_are_warned_of_where_they_are_kept() {
        let with =
            |value| statistics(&[handler("app", &[("pg_stat_statements.track_utility", value)])], "db");
        assert_eq!(with("on").verdict, Verdict::Warn);
        assert!(with("on").remedy.unwrap().contains("SET pg_stat_statements.track_utility = off;"));
        assert_eq!(with("off").verdict, Verdict::Ok);
        assert_eq!(statistics(&[handler("app", &[])], "db").verdict, Verdict::Ok);
    }

    #[test]
    fn very_many_roles_are_changed_with_the_database() {
        let handlers: Vec<Handler> = (0..25).map(|n| handler(&format!("app{n}"), &[])).collect();
        let finding = texts(&handlers, "db");
        assert!(finding.detail.contains("and 5 more"), "{}", finding.detail);
        assert_eq!(finding.remedy.as_deref(), Some("ALTER DATABASE db SET log_min_error_statement = panic;"));
    }

    #[test]
    fn those_who_see_what_others_run_are_named() {
        assert!(watched(&[]).detail.contains("none but superusers"));
        let found = watched(&["monitor".to_owned()]);
        assert_eq!(found.verdict, Verdict::Ok);
        assert!(found.detail.starts_with("monitor and superusers"), "{}", found.detail);
    }

    #[test]
    fn what_auto_explain_writes_is_reported_for_each_role() {
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
