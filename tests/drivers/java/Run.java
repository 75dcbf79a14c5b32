import java.sql.Connection;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.util.concurrent.Callable;
import org.postgresql.ds.PGSimpleDataSource;

/**
 * Run [careless]: runs what docs/drivers.md shows for JDBC, taken from there as Posts.java.
 *
 * Prints one line for each token: the titles, or the status and why it was refused; then the type that retry_after has, and
 * the seconds. The error texts go to standard error, where no token may appear.
 */
class Run {
    static final String ADDRESS = "203.0.113.7";

    static PGSimpleDataSource source(String options) {
        PGSimpleDataSource source = new PGSimpleDataSource();
        source.setUrl(System.getenv("URL").replace("postgresql://app@", "jdbc:postgresql://") + "?user=app&" + options);
        return source;
    }

    static void attempt(String name, Callable<Object> call) throws Exception {
        try {
            System.out.println(name + " " + call.call());
        } catch (SQLException error) {
            error.printStackTrace();
            System.err.println(error + " " + error.getMessage());
            System.out.println(name + " " + Posts.refusal(error)
                    .map(status -> status + " " + Posts.detail(error).orElseThrow())
                    .orElse("no refusal"));
        }
    }

    public static void main(String[] arguments) throws Exception {
        if (arguments.length > 0) {
            Posts.posts(source("preferQueryMode=simple"), System.getenv("CARELESS"), ADDRESS);
        }
        PGSimpleDataSource source = source("prepareThreshold=0");
        for (String name : new String[] {"good", "revoked", "narrow", "limited", "limited"}) {
            attempt(name, () -> {
                var titles = Posts.posts(source, System.getenv(name.toUpperCase()), ADDRESS);
                return "[\"" + String.join("\", \"", titles) + "\"]";
            });
        }
        String wait = "SELECT retry_after, extract(epoch FROM retry_after)::float8 FROM tollgate.verify_api_token(?)";
        try (Connection connection = source.getConnection(); PreparedStatement query = connection.prepareStatement(wait)) {
            query.setString(1, System.getenv("LIMITED"));
            try (ResultSet row = query.executeQuery()) {
                row.next();
                System.out.println("retry_after " + row.getObject(1).getClass().getSimpleName() + " double " + row.getDouble(2));
            }
        }
        attempt("lost", () -> {
            String lose = "SELECT pg_terminate_backend(pg_backend_pid())";
            try (Connection connection = source.getConnection();
                    PreparedStatement statement = connection.prepareStatement(lose)) {
                return statement.execute();
            }
        });
    }
}
