-- Last: nobody but the owner keeps anything, whatever default privileges the installing role had set up; then the
-- little that discloses nothing but the caller's own context is given to everyone.

DO $$
DECLARE
    statement text;
BEGIN
    FOR statement IN
        SELECT format('REVOKE ALL ON FUNCTION %s FROM %s', p.oid::regprocedure, g.who)
            FROM pg_proc p, LATERAL (
                SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS who
                FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee <> p.proowner) g
            WHERE p.pronamespace = 'tollgate'::regnamespace
        UNION ALL
        SELECT format('REVOKE ALL ON %s %s FROM %s', CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::regclass, g.who)
            FROM pg_class c, LATERAL (
                SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS who
                FROM aclexplode(c.relacl) a WHERE a.grantee <> c.relowner) g
            WHERE c.relnamespace = 'tollgate'::regnamespace AND c.relkind IN ('r', 'v', 'S')
        UNION ALL
        SELECT format('REVOKE ALL ON SCHEMA tollgate FROM %s', g.who)
            FROM pg_namespace n, LATERAL (
                SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS who
                FROM aclexplode(n.nspacl) a WHERE a.grantee <> n.nspowner) g
            WHERE n.nspname = 'tollgate'
    LOOP
        EXECUTE statement;
    END LOOP;
END
$$;

GRANT USAGE ON SCHEMA tollgate TO PUBLIC;
GRANT EXECUTE ON FUNCTION
    tollgate.scope_grants(text[], text),
    tollgate.token_has_scope(text),
    tollgate.token_has_any_scope(text[]),
    tollgate.token_has_all_scopes(text[]),
    tollgate.require_scope(text),
    tollgate.current_token_id(),
    tollgate.current_user_id(),
    tollgate.current_scopes()
TO PUBLIC;
