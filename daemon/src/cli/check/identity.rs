//! Whether transactions may authenticate with one token after another, which is for test suites alone.

use tokio_postgres::Client;

use super::finding::Finding;
use crate::error::{Doing as _, Result};

/// For whom it is on, and what ends it there.
struct Allowed {
    whom: String,
    remedy: String,
}

pub(super) async fn identity_changes(client: &Client) -> Result<Finding> {
    const DOING: &str = "look up tollgate.identity_changes";
    let rows = client
        .query(
            "select case when s.setrole <> 0 then 'role ' || quote_ident(r.rolname) \
                         when s.setdatabase <> 0 then 'this database' else 'all roles' end, \
                    format(case when s.setrole <> 0 and s.setdatabase <> 0 then 'ALTER ROLE %1$I IN DATABASE %2$I' \
                                when s.setrole <> 0 then 'ALTER ROLE %1$I' \
                                when s.setdatabase <> 0 then 'ALTER DATABASE %2$I' \
                                else 'ALTER ROLE ALL' end || ' RESET tollgate.identity_changes;', \
                           r.rolname, current_database()) \
             from pg_db_role_setting s cross join unnest(s.setconfig) c left join pg_roles r on r.oid = s.setrole \
             where split_part(c, '=', 1) = 'tollgate.identity_changes' and split_part(c, '=', 2)::boolean \
               and s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database())) \
             union all \
             select 'the whole server', 'ALTER SYSTEM SET tollgate.identity_changes = off; SELECT pg_reload_conf();' \
             from pg_settings \
             where name = 'tollgate.identity_changes' and reset_val::boolean \
               and source in ('configuration file', 'command line') \
             order by 1, 2",
            &[],
        )
        .await
        .doing(DOING)?;
    let allowed = rows
        .iter()
        .map(|row| Ok(Allowed { whom: row.try_get(0).doing(DOING)?, remedy: row.try_get(1).doing(DOING)? }))
        .collect::<Result<Vec<_>>>()?;
    Ok(finding(&allowed))
}

fn finding(allowed: &[Allowed]) -> Finding {
    const NAME: &str = "identity";
    if allowed.is_empty() {
        return Finding::ok(NAME, "a transaction has one identity");
    }
    let join = |part: fn(&Allowed) -> &str, separator: &str| {
        allowed.iter().map(part).collect::<Vec<_>>().join(separator)
    };
    Finding::warn(
        NAME,
        format!(
            "tollgate.identity_changes is on for {}: what one identity began in a transaction goes on as another",
            join(|one| &one.whom, ", ")
        ),
        join(|one| &one.remedy, "\n"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::check::finding::Verdict;

    #[test]
    fn each_place_where_it_is_on_is_named_with_its_end() {
        assert_eq!(finding(&[]).verdict, Verdict::Ok);
        let of = |whom: &str, remedy: &str| Allowed { whom: whom.to_owned(), remedy: remedy.to_owned() };
        let found = finding(&[of("role web", "one;"), of("this database", "two;")]);
        assert_eq!(found.verdict, Verdict::Warn);
        assert!(found.detail.contains("for role web, this database:"), "{}", found.detail);
        assert_eq!(found.remedy.as_deref(), Some("one;\ntwo;"));
    }
}
